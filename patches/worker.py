"""The worker's share: its engines, their statistics, and calls that offloading cannot serve.

Target: ``Worker`` in vllm.v1.worker.gpu_worker, which the CPU worker inherits.
Versions: 0.32, 0.33.
Why: statistics are asked for through the worker, and the worker is where weights are replaced.
How: engines of models loaded inside ``load_model`` stay with the worker; reloading and level 2
    sleep raise; statistics are logged between steps and start after warm-up.
Can go: the refusals when the host pool can be refilled.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import reduce
from operator import add
from types import ModuleType
from typing import Any

from vllm.logger import init_logger

from vllm_moe_offload.engine import EngineStats, OffloadEngine
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.patches.lookahead import Lookahead
from vllm_moe_offload.patches.wrapping import wrap

logger = init_logger("vllm.moe_offload")

_loading: ContextVar[list[OffloadEngine] | None] = ContextVar("moe_offload_loading", default=None)


def apply(module: ModuleType) -> None:
    """Let the worker keep and report its engines."""
    worker = module.Worker
    wrap(worker, "load_model", _load_model)
    wrap(worker, "compile_or_warm_up_model", warm_up)
    wrap(worker, "execute_model", _execute_model)
    wrap(worker, "sleep", _sleep)
    wrap(worker, "reload_weights", _refuse_weights)
    wrap(worker, "start_weight_update", _refuse_weights)
    wrap(worker, "shutdown", _shutdown)
    worker.moe_offload_stats = _stats


def engines_of_loading_worker() -> list[OffloadEngine]:
    """Where to put the engine of a model; a list of its own outside a worker."""
    engines = _loading.get()
    return [] if engines is None else engines


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    self.moe_offload_engines = []
    self.moe_offload_logged_at = time.monotonic()
    self.moe_offload_lookahead = Lookahead(self.vllm_config)
    token = _loading.set(self.moe_offload_engines)
    try:
        return original(self, *args, **kwargs)
    finally:
        _loading.reset(token)


def warm_up(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Start the statistics anew once the worker has warmed up."""
    result = original(self, *args, **kwargs)
    for engine in _engines(self):
        engine.reset_stats()
    return result


def _execute_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    engines = _engines(self)
    if not engines:
        return original(self, *args, **kwargs)
    schedule = args[0] if args else kwargs["scheduler_output"]
    tokens = self.moe_offload_lookahead.tokens_outside_graphs(schedule)
    for engine in engines:
        engine.step_begins(tokens, schedule.total_num_scheduled_tokens)
    result = original(self, *args, **kwargs)
    next_tokens = self.moe_offload_lookahead.next_tokens(schedule)
    for engine in engines:
        engine.step_ended(next_tokens)
    if interval := engines[0].config.stats_interval_s:
        now = time.monotonic()
        if now - self.moe_offload_logged_at >= interval:
            self.moe_offload_logged_at = now
            logger.info("%s", _line(_total(engines)))
    return result


def _stats(self: Any) -> dict[str, Any] | None:
    """Counts of this worker since warm-up, None if nothing is offloaded.

    With a predictor ``foresight`` tells how well each layer was foreseen.
    """
    engines = _engines(self)
    if not engines:
        return None
    stats: dict[str, Any] = _total(engines).as_dict()
    foresight = [layer.as_dict() for engine in engines for layer in engine.foresight()]
    return {**stats, "foresight": foresight} if foresight else stats


def _sleep(original: Callable[..., Any], self: Any, level: int = 1) -> Any:
    if level > 1 and _engines(self):
        raise OffloadError(
            "sleep level",
            level,
            "it discards weights, and offloaded experts cannot be loaded again",
            "Use level 1, or restart the server",
        )
    return original(self, level)


def _refuse_weights(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    if _engines(self):
        raise OffloadError(
            "weights",
            "reload",
            "offloaded experts cannot be replaced while the server runs",
            "Restart the server with the new checkpoint, or drop --plugin moe-offload",
        )
    return original(self, *args, **kwargs)


def _shutdown(original: Callable[..., Any], self: Any) -> Any:
    result = original(self)
    for engine in _engines(self):
        engine.close()
    self.moe_offload_engines = []
    return result


def _engines(worker: Any) -> list[OffloadEngine]:
    return getattr(worker, "moe_offload_engines", [])


def _total(engines: list[OffloadEngine]) -> EngineStats:
    return reduce(add, (engine.stats() for engine in engines))


def _line(stats: EngineStats) -> str:
    return (
        f"moe-offload: {stats.hit_ratio:.1%} of {stats.active} active experts were in slots, "
        f"{stats.misses} moved ({stats.bytes_moved / 2**30:.2f} GiB, {stats.streamed} through "
        f"staging), {stats.resident} of {stats.slots} slots in use"
    ) + (
        f", {stats.prefetched} fetched ahead, of which {stats.prefetch_hits} were read in time"
        if stats.prefetched
        else ""
    )
