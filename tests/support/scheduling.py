"""vLLM's own scheduler over a handful of blocks, without a model."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tenants import SAMPLED, Worker
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.patches.scheduler import REPORT

BLOCK_SIZE = 4

STEP_S = 0.01
"""What a step takes by ``Server.clock``."""


def make_config(checkpoint: Path, *, max_model_len: int, overlap: bool, **options: Any) -> Any:
    """Make a configuration; ``overlap`` asks for async scheduling."""
    return EngineArgs(
        model=str(checkpoint), max_model_len=max_model_len, block_size=BLOCK_SIZE,
        async_scheduling=overlap, enable_prefix_caching=True,
        **{"max_num_seqs": 6, "max_num_batched_tokens": 32, **options},
    ).create_engine_config()  # fmt: skip


def make_scheduler(config: Any, num_blocks: int) -> Scheduler:
    """Make the scheduler that vLLM would for this configuration."""
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32
    )
    cache = KVCacheConfig(
        num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["0"], spec)]
    )
    init_none_hash(sha256)
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=True,
    )


@dataclass
class Server:
    """An engine core's loop around a scheduler, with a worker that has no model.

    Args:
        scheduler: lends, or does not.
        boundary: as the scheduler's.
        depth: steps in flight.
    """

    scheduler: Scheduler
    boundary: Boundary
    depth: int = 1
    preempted: int = 0
    preempted_by_step: int = 0
    hit_tokens: int = 0
    freed_by_step: bool = False
    answered: int = 0
    finished: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._in_flight: deque[tuple[Any, list[str], set[int]]] = deque()
        limit = self.scheduler.vllm_config.model_config.max_model_len
        self.worker = Worker(self.boundary, BLOCK_SIZE, limit)
        self._added = 0

    def add(self, prompt: Sequence[int], max_tokens: int) -> str:
        """Queue a request that ends after so many tokens."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        params.update_from_generation_config({}, eos_token_id=0)
        self._added += 1
        request = Request(
            request_id=f"r{self._added}", prompt_token_ids=list(prompt), sampling_params=params,
            pooling_params=None, block_hasher=self._hasher,
        )  # fmt: skip
        self.scheduler.add_request(request)
        return request.request_id

    def clock(self) -> float:
        """Seconds that the steps so far have taken."""
        return self.answered * STEP_S

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return self.scheduler.has_requests() or bool(self._in_flight)

    def step(self) -> Any:
        """Schedule a step, and answer the oldest one where enough of them are in flight."""
        before = self._preemptions()
        output = self.scheduler.schedule()
        self.preempted_by_step = self._preemptions() - before
        self.preempted += self.preempted_by_step
        self.hit_tokens += sum(new.num_computed_tokens for new in output.scheduled_new_reqs)
        requests = self.scheduler.requests
        sampling = [
            name for name in output.num_scheduled_tokens if not requests[name].is_prefill_chunk
        ]
        self._in_flight.append((output, sampling, self.blocks_in_use()))
        ended = len(self.finished)
        while len(self._in_flight) >= self.depth or (
            self._in_flight and not output.num_scheduled_tokens
        ):
            self._answer(*self._in_flight.popleft())
        self.freed_by_step = len(self.finished) > ended
        return output

    def _preemptions(self) -> int:
        return sum(request.num_preemptions for request in self.scheduler.requests.values())

    def blocks_in_use(self) -> set[int]:
        """Ids of all blocks that requests hold."""
        manager = self.scheduler.kv_cache_manager
        return {
            id_
            for name in self.scheduler.requests
            for group in manager.get_block_ids(name)
            for id_ in group
        }

    def _answer(self, output: Any, sampling: list[str], in_use: set[int]) -> None:
        self.worker.run(output)
        first = self.boundary.first_block(self.worker.borrower.increments)
        assert all(id_ < first for id_ in in_use), "a step touches a block that is lent"
        names = list(output.num_scheduled_tokens)
        answer = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=[[SAMPLED] if name in sampling else [] for name in names],
        )
        self.answered += 1
        setattr(answer, REPORT, self.worker.report())
        outputs = self.scheduler.update_from_output(output, answer)
        for result in outputs.values():
            self.finished += [o.request_id for o in result.outputs if o.finish_reason is not None]
