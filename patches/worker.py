"""The worker's share: its engines, their statistics and recording, and what it cannot serve.

Target: ``Worker`` in vllm.v1.worker.gpu_worker, which the CPU worker inherits.
Versions: 0.32, 0.33.
Why: statistics are asked for through the worker, and the worker is where weights are replaced.
How: engines of models loaded inside ``load_model`` stay with the worker, whose KV cache one of
    them may share (``borrowing``); reloading and level 2 sleep raise; what later steps launch is
    compiled before warm-up; statistics, recording and what eviction learns start after it and go
    on beside the steps, of which they are only told.
Can go: the refusals when the host pool can be refilled.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import asdict
from functools import partial, reduce
from operator import add
from types import ModuleType
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.lending.orders import Order, Report
from vllm_moe_offload.metrics.page import Worker, page_path
from vllm_moe_offload.metrics.reporter import Reporter, labelled
from vllm_moe_offload.patches.borrowing import Borrowing, Share, share_of
from vllm_moe_offload.patches.lookahead import Lookahead
from vllm_moe_offload.patches.recording import Recording
from vllm_moe_offload.patches.wrapping import wrap
from vllm_moe_offload.pcie import device_link

logger = init_logger("vllm.moe_offload")

_loading: ContextVar[list[OffloadEngine] | None] = ContextVar("moe_offload_loading", default=None)


def apply(module: ModuleType) -> None:
    """Let the worker keep and report its engines."""
    worker = module.Worker
    wrap(worker, "load_model", _load_model)
    wrap(worker, "compile_or_warm_up_model", warm_up)
    wrap(worker, "initialize_from_config", _initialize_from_config)
    wrap(worker, "execute_model", _execute_model)
    wrap(worker, "sample_tokens", _sample_tokens)
    wrap(worker, "sleep", _sleep)
    wrap(worker, "wake_up", _wake_up)
    wrap(worker, "discard", _discard)
    wrap(worker, "reload_weights", _refuse_weights)
    wrap(worker, "start_weight_update", _refuse_weights)
    wrap(worker, "save_sharded_state", _refuse_saving)
    wrap(worker, "shutdown", _shutdown)
    worker.moe_offload_stats = _stats
    worker.moe_offload_share = _share
    worker.moe_offload_follow = _follow


def engines_of_loading_worker() -> list[OffloadEngine]:
    """Where to put the engine of a model; a list of its own outside a worker."""
    engines = _loading.get()
    return [] if engines is None else engines


def _load_model(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    self.moe_offload_engines = []
    self.moe_offload_lookahead = Lookahead(self.vllm_config)
    self.moe_offload_reporter = None
    self.moe_offload_borrowing = None
    self.moe_offload_asleep = None
    token = _loading.set(self.moe_offload_engines)
    try:
        result = original(self, *args, **kwargs)
    finally:
        _loading.reset(token)
    # The model that is served comes before the one that drafts for it.
    if self.moe_offload_engines and self.moe_offload_engines[0].config.trace_path is not None:
        self.moe_offload_recording = Recording(self, self.moe_offload_engines[0])
    return result


def _initialize_from_config(
    original: Callable[..., Any], self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any
) -> Any:
    result = original(self, kv_cache_config, *args, **kwargs)
    engines = _engines(self)
    if engines and engines[0].borrows:
        self.moe_offload_borrowing = Borrowing(self, kv_cache_config, engines[0])
    return result


def _share(self: Any) -> Share | None:
    """How this worker's memory can be split, None if nothing is offloaded."""
    engines = _engines(self)
    return share_of(self, engines[0], _borrowing(self)) if engines else None


def _follow(self: Any, order: Order) -> Report:
    """Carry out an order between steps."""
    borrowing = _borrowing(self)
    assert borrowing is not None, "a worker gets an order that does not borrow"
    return borrowing.follow_at_once(order)


def warm_up(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Compile ahead, forget what the worker's warm-up has done, and begin to record."""
    engines = _engines(self)
    # Before vLLM's own warm-up, at whose end it starts to warn of whatever is compiled.
    with torch.inference_mode():
        for engine in engines:
            engine.rehearse()
    result = original(self, *args, **kwargs)
    for engine in engines:
        engine.forget_routing()
    if recording := _recording(self):
        recording.start()
    for engine in engines:
        engine.reset_stats()
    if engines and self.moe_offload_reporter is None:
        self.moe_offload_reporter = _reporter(self, engines)
        self.moe_offload_reporter.start()
    return result


def _reporter(worker: Any, engines: list[OffloadEngine]) -> Reporter:
    config = worker.vllm_config
    served = config.model_config.served_model_name
    identity = Worker(
        model=served[0] if isinstance(served, list) else served,
        engine=config.parallel_config.data_parallel_index,
        rank=worker.rank,
    )
    device = engines[0].device

    def link_rate() -> float | None:
        link = device_link(device)
        return link.bytes_per_s if link else None

    return Reporter(
        engines, identity, page_path(identity), partial(logger.info, "%s"), link_rate=link_rate
    )


def _execute_model(
    original: Callable[..., Any], self: Any, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    engines = _engines(self)
    if not engines:
        return original(self, scheduler_output, *args, **kwargs)
    borrowing = _borrowing(self)
    if borrowing:
        borrowing.follow(scheduler_output)
    tokens = self.moe_offload_lookahead.tokens_outside_graphs(scheduler_output)
    for engine in engines:
        engine.step_begins(tokens, scheduler_output.total_num_scheduled_tokens)
    result = original(self, scheduler_output, *args, **kwargs)
    if recording := _recording(self):
        recording.note(self.model_runner, scheduler_output, result)
    next_tokens = self.moe_offload_lookahead.next_tokens(scheduler_output)
    for engine in engines:
        engine.step_ended(next_tokens)
    if reporter := _reporter_of(self):
        reporter.note_step()
    return borrowing.attach(result) if borrowing else result


def _sample_tokens(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    borrowing = _borrowing(self)
    return borrowing.attach(result) if borrowing else result


def _stats(self: Any) -> dict[str, Any] | None:
    """Counts of this worker since warm-up, None if nothing is offloaded."""
    engines = _engines(self)
    if not engines:
        return None
    if (kept := _asleep(self)) is not None:
        return kept
    counts = [engine.layer_counts() for engine in engines]
    totals = (engine.total(layers) for engine, layers in zip(engines, counts, strict=True))
    return {
        **reduce(add, totals).as_dict(),
        "policies": engines[0].policies,
        "by_layer": [_layer_stats(layer) for layer in labelled(counts)],
    }


def _layer_stats(layer: LayerCounts) -> dict[str, Any]:
    return {
        **asdict(layer),
        "coverage": layer.coverage,
        "precision": layer.precision,
        "stall_seconds": layer.stall_seconds,
        "transfer_seconds": layer.transfer_seconds,
    }


def _sleep(original: Callable[..., Any], self: Any, level: int = 1) -> Any:
    if level > 1 and _engines(self):
        raise OffloadError(
            "sleep level",
            level,
            "it discards weights, and offloaded experts cannot be loaded again",
            "Use level 1, or restart the server",
        )
    if _engines(self):
        self.moe_offload_asleep = _stats(self)  # no step will change them
    if reporter := _reporter_of(self):
        reporter.pause()
    if recording := _recording(self):
        recording.settle()  # what sleeps is unmapped
    if borrowing := _borrowing(self):
        borrowing.empty()
    return original(self, level)


def _wake_up(original: Callable[..., Any], self: Any, tags: list[str] | None = None) -> Any:
    result = original(self, tags)
    if _engines(self) and (tags is None or "weights" in tags):
        self.moe_offload_asleep = None
    return result


def _discard(original: Callable[..., Any], self: Any, tags: tuple[str, ...]) -> Any:
    """Give up parts of the memory, which with the KV cache are the slots that are borrowed."""
    if borrowing := _borrowing(self):
        borrowing.empty()
    return original(self, tags)


def _refusal(action: str, problem: str, remedy: str) -> Callable[..., Any]:
    """Refuse what cannot be done to the weights of a worker that offloads."""

    def refuse(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        if _engines(self):
            raise OffloadError("weights", action, problem, remedy)
        return original(self, *args, **kwargs)

    return refuse


_refuse_weights = _refusal(
    "reload",
    "offloaded experts cannot be replaced while the server runs",
    "Restart the server with the new checkpoint, or drop --plugin moe-offload",
)
_refuse_saving = _refusal(
    "save_sharded_state",
    "offloaded experts lie in rows of the host pool, which no other server could load",
    "Save them from a server without --plugin moe-offload",
)


def _shutdown(original: Callable[..., Any], self: Any) -> Any:
    if reporter := _reporter_of(self):
        reporter.close()
        self.moe_offload_reporter = None
    if recording := _recording(self):
        recording.close()
    self.moe_offload_recording = None
    result = original(self)
    self.moe_offload_borrowing = None
    for engine in _engines(self):
        engine.close()
    self.moe_offload_engines = []
    return result


def _engines(worker: Any) -> list[OffloadEngine]:
    return getattr(worker, "moe_offload_engines", [])


def _reporter_of(worker: Any) -> Reporter | None:
    return getattr(worker, "moe_offload_reporter", None)


def _asleep(worker: Any) -> dict[str, Any] | None:
    """What was counted when the worker fell asleep: what counts is unmapped until it wakes up."""
    return getattr(worker, "moe_offload_asleep", None)


def _borrowing(worker: Any) -> Borrowing | None:
    return getattr(worker, "moe_offload_borrowing", None)


def _recording(worker: Any) -> Recording | None:
    return getattr(worker, "moe_offload_recording", None)
