"""A real vLLM whose experts borrow from the KV cache, watched step by step."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from vllm_moe_offload.lending.borrower import Borrower
from vllm_moe_offload.lending.controller import FixedPolicy, Standing
from vllm_moe_offload.lending.orders import Order
from vllm_moe_offload.lending.rows import borrowed_rows

POISON = 0xFF
"""Bytes of this value are NaN in every floating-point type."""


class Restless(FixedPolicy):
    """Wants the boundary somewhere else in every step, and gives way."""

    gives_way = True

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._most = most
        self._random = random.Random(5)

    def decide(self, standing: Standing) -> int:
        self._increments = self._random.randint(0, self._most)
        return self._increments


class Switched(Restless):
    """Rests at a split until it is told to move."""

    split = 0
    moves = False

    def decide(self, standing: Standing) -> int:
        return super().decide(standing) if self.moves else self.split


def restless(config: Any, boundary: Any) -> Restless:
    """In place of ``patches.lending._policy``."""
    return Restless(boundary.max_increments)


def switched(split: int) -> Any:
    """The same, for a policy that rests at first."""

    def policy(config: Any, boundary: Any) -> Switched:
        made = Switched(boundary.max_increments)
        made.split = split
        return made

    return policy


def let_layers_lie_side_by_side(cpu_attn: Any) -> None:
    """Let vLLM's CPU backend put the layers of a block together.

    It names one layout, in which they lie apart, but its kernels address blocks by their stride.
    """
    from vllm.v1.kv_cache_layout import KVCacheLayout

    layouts = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
    cpu_attn.CPUAttentionBackend.supported_kv_cache_layouts = staticmethod(lambda: layouts)


@dataclass
class Watch:
    """What happened to the boundary while somebody watched."""

    moves: int = 0
    increments: list[int] = field(default_factory=list)


@contextmanager
def poisoned_moves() -> Iterator[Watch]:
    """Fill every slot that opens with NaN, and see that bytes that go back are zero."""
    watch, follow = Watch(), Borrower.follow

    def poisoned(self: Borrower, order: Any) -> None:
        before = self.increments
        follow(self, order)
        watch.moves += 1
        watch.increments.append(self.increments)
        boundary, size = self.boundary, self.boundary.block_bytes
        if self.increments > before:
            opened = boundary.slots(before, self.increments)
            for layer in range(len(boundary.row_bytes)):
                rows_SB = borrowed_rows(self._bytes, boundary, layer)
                rows_SB[opened.start : opened.stop].fill_(POISON)
        back = boundary.blocks(min(before, self.increments), before)
        assert not self._bytes[back.start * size : back.stop * size].any(), "not zeroed"

    with mock.patch.object(Borrower, "follow", poisoned):
        yield watch


def core_of(llm: Any) -> Any:
    """The engine core of an ``LLM`` in this process."""
    return llm.llm_engine.engine_core.engine_core


def worker_of(llm: Any) -> Any:
    """Its only worker."""
    return core_of(llm).model_executor.driver_worker.worker


def check(llm: Any) -> None:
    """Raise unless both halves agree, every slot holds its expert, and no block has two tenants."""
    core, (engine, *_) = core_of(llm), worker_of(llm).moe_offload_engines
    lending = core.scheduler.moe_offload_lending
    lending.lender.ledger.check_integrity()
    lending.lender.book.check_integrity()
    engine.check_integrity()
    first = engine.borrower.boundary.first_block(engine.borrower.increments)
    manager = core.scheduler.kv_cache_manager
    used = {
        id_
        for name in core.scheduler.requests
        for group in manager.get_block_ids(name)
        for id_ in group
    }
    # With steps in flight the scheduler is ahead, and what it has taken back is still open.
    if not core.batch_queue:
        assert engine.borrower.increments == max(
            lending.lender.ledger.lent, engine.borrower.boundary.min_increments
        )
        assert all(id_ < first for id_ in used), "a request holds a block that is lent"


def order_after(follower: Any) -> Any:
    """Makes orders that a worker accepts, as if the scheduler had given them."""
    return lambda increments: Order(follower.number + 1, increments)


def adopt(book: Any, follower: Any) -> None:
    """Let the scheduler's side go on from orders that it has not given."""
    book.confirmed = follower.report()
    book._last = Order(follower.number, follower.increments)
    book._unconfirmed.clear()


Answer = tuple[list[int], list[float]]
"""Token ids and their log-probabilities."""


def serve(
    llm: Any, prompts: Sequence[list[int]], max_tokens: int, *, check_every: int = 0, start: int = 0
) -> list[Answer]:
    """Answer prompts that arrive a few steps apart, and look at everything every so many steps."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=1)
    engine, answers, waiting = llm.llm_engine, {}, list(enumerate(prompts))
    steps = 0
    while waiting or engine.has_unfinished_requests():
        if waiting and steps % 3 == 0:
            number, prompt = waiting.pop(0)
            engine.add_request(str(start + number), {"prompt_token_ids": prompt}, sampling)
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id) - start] = output.outputs[0]
        steps += 1
        if check_every and steps % check_every == 0:
            check(llm)
    return [_answer(answer) for _, answer in sorted(answers.items())]


def _answer(output: Any) -> Answer:
    steps = zip(output.token_ids, output.logprobs, strict=True)
    return list(output.token_ids), [step[token].logprob for token, step in steps]


def prompts(count: int, length: int, vocabulary: int = 500) -> list[list[int]]:
    """Prompts of differing length and content, without a common beginning."""
    return [
        [3 + (17 * n + i * (n + 3)) % vocabulary for i in range(1 + length * (1 + n % 4) // 4)]
        for n in range(count)
    ]
