"""Borrowing in a worker: the boundary of its KV buffer, orders before steps, reports after them.

Reads: ``KVCacheConfig``, ``GPUModelRunner.kv_caches`` of both model runners, ``SchedulerOutput``;
    writes an attribute of ``ModelRunnerOutput``.
Versions: 0.32, 0.33.
Why: only the worker has the buffer and its stream, and what the runner returns is the one thing
    that every executor passes back.
How: called by the patch of the worker. After the cache has been allocated for good, and not for
    the throw-away one with which vLLM measures its graphs, the engine takes its slots from it.
    What the second runner and the first with async scheduling return is finished later by another
    thread, so there the report is attached when it is. An output that vLLM shares between steps
    is copied.
Can go: when vLLM can resize its cache.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.lending.borrower import Borrower
from vllm_moe_offload.lending.boundary import Boundary, floor_blocks
from vllm_moe_offload.lending.orders import Order, Report
from vllm_moe_offload.patches.scheduler import ORDER, REPORT
from vllm_moe_offload.patches.wrapping import PatchError

LEAST_SHARE = 1 / 16
"""Of the buffer: where the experts of one token take less, slots for them are never handed back,
so that steps of one token never stream and their graphs are free of waves."""


@dataclass(frozen=True)
class Share:
    """What a worker tells the engine core about its memory."""

    boundary: Boundary | None
    """None where the KV cache is not shared."""
    reason: str | None
    """Why it is not, None where nobody asked for it."""
    total_bytes: int
    """What vLLM may take of the device, 0 if that was not limited."""
    dense_bytes: int
    """Weights that are not offloaded."""
    layers: int
    slots: int
    """Of all layers, now."""
    experts: int
    """Of all layers."""


class Borrowing:
    """A worker's half of the shared KV cache.

    Args:
        worker: vLLM's; its KV cache has been allocated.
        kv_cache_config: what it was allocated by.
        engine: of the model that is served.
    """

    def __init__(self, worker: Any, kv_cache_config: Any, engine: OffloadEngine) -> None:
        self._engine = engine
        boundary = _boundary(worker.vllm_config, kv_cache_config, engine)
        buffer = _buffer(worker.model_runner, kv_cache_config)
        self.borrower: Borrower = engine.borrow(buffer, boundary)
        self._refills = True

    def follow(self, scheduler_output: Any) -> None:
        """Carry out the order of a step, if it brings one, before anything else of the step."""
        self._refills = False
        order: Order | None = getattr(scheduler_output, ORDER, None)
        if order is not None:
            self._follow(order)

    def follow_at_once(self, order: Order) -> Report:
        """Carry out an order between steps; fills what opens if there was a warm start."""
        self._follow(order)
        if self._refills:
            with torch.inference_mode():
                self._engine.refill_slots()
        return self.borrower.report()

    def _follow(self, order: Order) -> None:
        with torch.inference_mode():
            self.borrower.follow(order)

    def empty(self) -> None:
        """Let no slot hold anything: the buffer is about to be discarded."""
        with torch.inference_mode():
            self.borrower.empty()

    def attach(self, output: Any) -> Any:
        """Let what the runner returned carry a report."""
        from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

        if not isinstance(output, AsyncModelRunnerOutput | ModelRunnerOutput):
            return output
        report = self.borrower.report()
        if isinstance(output, AsyncModelRunnerOutput):
            finish: Callable[[], Any] = output.get_output
            output.get_output = lambda: _with_report(finish(), report)
            return output
        return _with_report(output, report)


def _with_report(output: Any, report: Report) -> Any:
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    if output is EMPTY_MODEL_RUNNER_OUTPUT:
        output = copy(output)
    setattr(output, REPORT, report)
    return output


def share_of(worker: Any, engine: OffloadEngine, borrowing: Borrowing | None) -> Share:
    """What there is to tell about a worker's memory."""
    stats = engine.stats()
    return Share(
        boundary=borrowing.borrower.boundary if borrowing else None,
        reason=engine.not_shared,
        total_bytes=_total_bytes(worker),
        dense_bytes=engine.dense_bytes,
        layers=stats.layers,
        slots=stats.slots,
        experts=stats.experts_in_pool,
    )


def _total_bytes(worker: Any) -> int:
    if worker.vllm_config.cache_config.kv_cache_memory_bytes:
        return 0  # vLLM then keeps to no share of the memory
    # A CPU's worker has a name of its own for it.
    names = ("requested_memory", "requested_cpu_memory")
    return next((int(getattr(worker, name)) for name in names if hasattr(worker, name)), 0)


def _boundary(vllm_config: Any, kv_cache_config: Any, engine: OffloadEngine) -> Boundary:
    config, blocks = engine.config, kv_cache_config.num_blocks
    row_bytes = tuple(spec.layout.row_bytes for spec in engine.specs)
    floor = _floor_blocks(vllm_config, kv_cache_config, config)
    stride = _block_bytes(kv_cache_config)
    boundary = Boundary(
        num_blocks=blocks,
        block_bytes=stride,
        row_bytes=row_bytes,
        floor_blocks=floor,
        most_slots=max(spec.num_experts for spec in engine.specs),
        least_increments=_least_increments(engine, blocks * stride, sum(row_bytes)),
    )
    if config.kv_policy == "fixed":
        return replace(boundary, least_increments=boundary.max_increments)
    return boundary


def _floor_blocks(vllm_config: Any, kv_cache_config: Any, config: MoeOffloadConfig) -> int:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise _differs(f"it has {len(groups)} groups of layers")
    (group,) = groups
    drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", 0) or 0
    tokens = vllm_config.model_config.max_model_len + drafts
    return floor_blocks(
        kv_cache_config.num_blocks,
        sequence_blocks=-(-tokens // group.kv_cache_spec.block_size),
        # The watermark stays free when a request is admitted.
        share=min(1.0, config.kv_floor + vllm_config.scheduler_config.watermark),
    )


def _least_increments(engine: OffloadEngine, buffer_bytes: int, increment_bytes: int) -> int:
    routings = [spec.routing for spec in engine.specs]
    if None in routings:
        return 0
    top_k = max(routing.top_k for routing in routings if routing is not None)
    return top_k if top_k * increment_bytes <= LEAST_SHARE * buffer_bytes else 0


def _block_bytes(kv_cache_config: Any) -> int:
    strides = {tensor.block_stride for tensor in kv_cache_config.kv_cache_tensors}
    if len(strides) != 1:
        raise _differs(f"blocks are {sorted(strides)} bytes apart")
    (stride,) = strides
    size = kv_cache_config.kv_cache_tensors[0].size
    if stride * kv_cache_config.num_blocks != size:
        raise _differs(f"{kv_cache_config.num_blocks} blocks of {stride} bytes are not {size}")
    return int(stride)


def _buffer(runner: Any, kv_cache_config: Any) -> torch.Tensor:
    storages = {cache.untyped_storage().data_ptr(): cache for cache in runner.kv_caches}
    if len(storages) != 1:
        raise _differs(f"it has {len(storages)} buffers")
    (cache,) = storages.values()
    # A tensor that was made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        buffer = torch.empty(0, dtype=torch.uint8, device=cache.device)
        buffer.set_(cache.untyped_storage())
    return buffer[: kv_cache_config.kv_cache_tensors[0].size]


def _differs(how: str) -> PatchError:
    return PatchError(
        f"moe-offload: the KV cache of this version of vLLM is laid out in another way: {how}. "
        "Give --moe-offload-gpu-gb a number, so that it is not shared, and report this."
    )
