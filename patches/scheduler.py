"""The scheduler lends what requests leave free, and gives way to them.

Target: ``Scheduler.schedule`` and ``.update_from_output`` in vllm.v1.core.sched.scheduler, which
    ``AsyncScheduler`` inherits; ``KVCacheManager.allocate_slots`` in vllm.v1.core.kv_cache_manager.
Versions: 0.32, 0.33.
Why: only the scheduler knows which blocks no step will touch, and when a request needs more.
How: the boundary moves before a step is scheduled. Where ``allocate_slots`` finds too few free
    blocks, which is where a request would be preempted or go on waiting, blocks come back and it
    is asked again; it changes nothing that matters when it returns None. The order for the
    workers is an attribute of the ``SchedulerOutput``, a dataclass without slots that the
    executor passes on (``uni``) or pickles (``mp``); the report is one of the
    ``ModelRunnerOutput``. Each output of ``schedule`` reaches every worker once and in order, in
    ``EngineCore.step`` and ``.step_with_batch_queue`` alike, also when it schedules no token.
    Nothing happens for a scheduler that ``start_lending`` was not called for.
Can go: when vLLM can resize its pool.
"""

import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.controller import Ghosts, Policy
from vllm_moe_offload.lending.lender import Lender
from vllm_moe_offload.lending.orders import Order, Report
from vllm_moe_offload.patches.block_pool import VllmPool
from vllm_moe_offload.patches.wrapping import wrap

ORDER = "moe_offload_order"
"""Attribute of a ``SchedulerOutput``, there if the workers have to do something."""

REPORT = "moe_offload_report"
"""Attribute of a ``ModelRunnerOutput``."""

_LENDING = "moe_offload_lending"


def apply(module: ModuleType) -> None:
    """Let schedulers lend blocks."""
    wrap(module.Scheduler, "schedule", _schedule)
    wrap(module.Scheduler, "update_from_output", _update_from_output)
    wrap(module.KVCacheManager, "allocate_slots", _allocate_slots)


def start_lending(
    scheduler: Any,
    boundary: Boundary,
    policy: Policy,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> "Lending":
    """Share a scheduler's blocks with experts from now on.

    Args:
        scheduler: vLLM's, with nothing lent yet.
        boundary: of the workers' buffer.
        policy: where the boundary should be.
        clock: seconds, to time steps by.
    """
    lending = Lending(scheduler, boundary, policy, clock)
    setattr(scheduler, _LENDING, lending)
    setattr(scheduler.kv_cache_manager, _LENDING, lending)
    return lending


class Lending:
    """A scheduler's lender, and what is measured for its policy.

    Args:
        scheduler: vLLM's.
        boundary: of the workers' buffer.
        policy: where the boundary should be.
        clock: seconds, to time steps by.
    """

    def __init__(
        self, scheduler: Any, boundary: Boundary, policy: Policy, clock: Callable[[], float]
    ) -> None:
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.num_gpu_blocks == boundary.num_blocks, "the boundary is of another buffer"
        self._scheduler = scheduler
        self._ghosts = Ghosts(len(boundary.blocks(0, boundary.max_increments)))
        self._policy = policy
        self.lender = Lender(boundary, VllmPool(pool, self._ghosts), policy)
        self._clock = clock
        self._answered_at = clock()

    def scheduled(self, output: Any) -> None:
        """Count what the prefix cache held of the requests that begin in this step."""
        hits = lost = depth = 0
        size = self._scheduler.hash_block_size
        for new in output.scheduled_new_reqs:
            hits += new.num_computed_tokens
            request = self._scheduler.requests[new.req_id]
            absent = request.block_hashes[new.num_computed_tokens // size :]
            count, blocks = self._ghosts.wanted(_cache_key(block_hash) for block_hash in absent)
            lost, depth = lost + size * count, max(depth, blocks)
        self._policy.looked_up(hits, lost, depth)

    def finished(self, output: Any, report: Report | None) -> None:
        """File a step's report and what it took."""
        now = self._clock()
        seconds, self._answered_at = now - self._answered_at, now
        self._policy.step(seconds, output.total_num_scheduled_tokens)
        if report is None:
            return
        before = self.lender.book.confirmed
        self.lender.book.file(report)
        moved = self.lender.book.confirmed.miss_bytes - before.miss_bytes
        self._policy.missed(max(0, moved), report.bytes_per_second)

    def resumes(self) -> None:
        """Leave out of the step's time that nothing was to do before it."""
        self._answered_at = self._clock()


def _cache_key(block_hash: Any) -> Any:
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    return make_block_hash_with_group_id(block_hash, 0)


def _schedule(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    lending: Lending | None = getattr(self, _LENDING, None)
    if lending is None:
        return original(self, *args, **kwargs)
    if not self.running:
        lending.resumes()
    lending.lender.step_begins()
    output = original(self, *args, **kwargs)
    lending.scheduled(output)
    order: Order | None = lending.lender.step_scheduled()
    if order is not None:
        setattr(output, ORDER, order)
    return output


def _update_from_output(
    original: Callable[..., Any], self: Any, scheduler_output: Any, model_runner_output: Any
) -> Any:
    lending: Lending | None = getattr(self, _LENDING, None)
    if lending is not None:
        lending.finished(scheduler_output, getattr(model_runner_output, REPORT, None))
    return original(self, scheduler_output, model_runner_output)


def _allocate_slots(
    original: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any
) -> Any:
    from vllm.v1.request import RequestStatus

    blocks = original(self, request, *args, **kwargs)
    lending: Lending | None = getattr(self, _LENDING, None)
    if lending is None:
        return blocks
    running = request.status == RequestStatus.RUNNING
    while blocks is None and lending.lender.make_room(running=running):
        blocks = original(self, request, *args, **kwargs)
    return blocks
