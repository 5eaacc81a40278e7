"""Another engine for a running server: other options over the weights that are there.

Starting a server takes minutes, of which most go into its host pool and its compiled code. Both are
the same for every policy, predictor and share. What differs is made anew here: slots, tables, what
was learned, and the CUDA graphs.
"""

import gc
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine


class Successor(OffloadEngine):
    """Runs the layers of an engine that nobody uses any more, out of the same host pool."""

    @classmethod
    def of(cls, old: OffloadEngine, options: dict[str, Any], **about: Any) -> "Successor":
        """Take over an engine's pool; the caller lets go of it before ``plan``.

        Args:
            old: the engine.
            options: of the plugin.
            about: the other arguments of an engine.
        """
        new = cls(MoeOffloadConfig.parse(options), old.device, **about)
        new.pool, new.specs, new.routers = old.pool, old.specs, old.routers
        # Nothing has run yet from which it could know what there is to compile.
        new.rehearsal = old.rehearsal.again()
        return new

    @staticmethod
    def _check(*_planned: object) -> None:
        """Host memory was checked for the first engine; the pool counts as taken by now."""


class Exchange:
    """Exchanges the engine of a worker.

    Args:
        worker: vLLM's worker, in this process.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self.said: list[str] = []
        """Lines of log of the engine in use."""
        self._graphs: list[Any] = []

    def build(self, options: dict[str, Any]) -> OffloadEngine:
        """Give the worker an engine with other options, and capture its steps.

        Args:
            options: of the plugin, all of them.
        """
        from vllm_moe_offload.patches.recording import Recording, tokens_to_log
        from vllm_moe_offload.patches.worker import warm_up

        worker, config = self._worker, self._worker.vllm_config
        model = worker.model_runner.get_model()
        self._end_threads()
        (old,) = worker.moe_offload_engines
        self.said = []
        new = Successor.of(
            old, options,
            spans_layers=old._spans_layers,
            say=self.said.append,
            log_tokens=tokens_to_log(config, config.model_config, MoeOffloadConfig.parse(options)),
        )  # fmt: skip
        # Its slots are freed before the new ones are taken: both might not fit.
        slots = weakref.ref(old.arena)
        worker.moe_offload_engines.clear()
        _join(model, new)
        del old
        gc.collect()
        assert slots() is None, "somebody still holds the engine before"
        if new.device.type == "cuda":
            torch.cuda.empty_cache()
        new.plan()
        new.finish_loading()
        worker.moe_offload_engines.append(new)
        if new.config.trace_path is not None:
            worker.moe_offload_recording = Recording(worker, new)
        warm_up(self._capture, worker)
        return new

    def _end_threads(self) -> None:
        worker = self._worker
        if reporter := worker.moe_offload_reporter:
            reporter.close()
            worker.moe_offload_reporter = None
        if recording := getattr(worker, "moe_offload_recording", None):
            recording.close()
            worker.moe_offload_recording = None

    def _capture(self, worker: Any) -> None:
        """Capture all graphs again, as vLLM does when its expert parallelism changes."""
        if worker.model_config.enforce_eager:
            return
        torch.cuda.synchronize()
        for graphs in graphs_of(worker):
            # A memory pool for graphs cannot be used again once it holds none. The old ones take
            # some megabytes each, and are never replayed.
            self._graphs.append(dict(graphs))
            graphs.clear()
        worker.model_runner.capture_model()
        torch.cuda.synchronize()


def in_turn(
    engines: Iterable[dict[str, Any]], run: Callable[[dict[str, Any]], None], talk: Any
) -> None:
    """Measure one engine after the other; one that fails leaves the others.

    Args:
        engines: with their ``name``.
        run: exchanges the engine and notes its rows.
        talk: see ``timed_server.Talk``.

    Raises:
        SystemExit: some have failed, by name; all that the process has to tell is written then.
    """
    failed = []
    for asked in engines:
        try:
            run(asked)
        except Exception:
            failed.append(asked["name"])
            traceback.print_exc()
    if failed:
        talk.end()
        sys.exit(f"failed: {', '.join(failed)}")


def find_routers_early() -> None:
    """Have every engine know the routers of its model: a CPU packs them away when it has loaded."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from vllm_moe_offload.layer import building_engine
    from vllm_moe_offload.patches.routers import find_routers

    original = BaseModelLoader.create_model

    def create_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(self, *args, **kwargs)
        if engine := building_engine():
            engine.routers = find_routers(model, engine.specs)
        return model

    BaseModelLoader.create_model = create_model


def graphs_of(worker: Any) -> list[dict[Any, Any]]:
    """Where vLLM keeps the graphs that it has captured, by the shape of their steps."""
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper

    found = [
        wrapper.concrete_cudagraph_entries for wrapper in list(CUDAGraphWrapper._all_instances)
    ]
    found += [wrapper.entries for wrapper in list(BreakableCUDAGraphWrapper._all_instances)]
    # The second model runner keeps those of whole steps itself.
    manager = getattr(worker.model_runner, "cudagraph_manager", None)
    return found if manager is None else [*found, manager.graphs]


def _join(model: Any, engine: OffloadEngine) -> None:
    from vllm_moe_offload.layer import is_offloaded

    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if is_offloaded(method):
            method.offload_engine = engine
