"""What a worker's steps write into the KV cache's buffer, without a model.

Every token leaves bytes that follow from all tokens up to it, as keys and values do, in the blocks
that the scheduler names. Every slot that opens is filled with NaN, as if an expert came in at
once. So a block with two tenants, or a prefix that is not what it was, is seen in the bytes.

Legend: N blocks, C tokens of a block, P positions of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_moe_offload.lending.borrower import Borrower
from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.orders import Report
from vllm_moe_offload.patches.scheduler import ORDER
from vllm_moe_offload.residencies import Residencies

POISON = 0xFF
"""Bytes of this value are NaN in every floating-point type."""

SAMPLED = 7
"""The one token that the model ever answers."""

MISS_BYTES = 10_000_000
"""What the worker says that it moved in every step."""

CHECKED_MOVES = 16
"""Moves between two looks at all tables."""


@dataclass
class _Sequence:
    marks_P: NDArray[np.uint8]
    blocks: list[int]


class Worker:
    """Carries out orders, and computes what is scheduled.

    Args:
        boundary: of its buffer.
        block_tokens: C.
        max_tokens: P, of the longest sequence.
    """

    bytes_per_second = 0.0

    def __init__(self, boundary: Boundary, block_tokens: int, max_tokens: int) -> None:
        self.boundary, self._max_tokens = boundary, max_tokens
        buffer = torch.zeros(boundary.num_blocks * boundary.block_bytes, dtype=torch.uint8)
        layers, slots = len(boundary.row_bytes), boundary.max_increments
        self.residencies = Residencies(
            [slots + 4] * layers, [slots] * layers, buffer.device,
            least_open=boundary.min_increments,
        )  # fmt: skip
        self.borrower = Borrower(boundary, buffer, self.residencies, self, lambda: None)
        self._bytes = buffer.numpy()
        blocks = self._bytes.reshape(boundary.num_blocks, boundary.block_bytes)
        size = boundary.block_bytes // block_tokens
        self._tokens_NCB = blocks[:, : size * block_tokens].reshape(-1, block_tokens, size)
        self._ends_NC2 = self._tokens_NCB[..., :: size - 1]
        self._sequences: dict[str, _Sequence] = {}
        self._steps = self._moves = 0
        self._slots_from(0)[:] = POISON

    def num_bytes(self) -> int:
        return MISS_BYTES * self._steps

    def report(self) -> Report:
        return self.borrower.report()

    def run(self, output: Any) -> None:
        """Do what the output of a ``schedule()`` asks for."""
        self._steps += 1
        order = getattr(output, ORDER, None)
        if order is not None:
            self._follow(order)
        self._note(output)
        # All write before any reads: a sequence may begin with what another computes in this step.
        steps = [
            (self._sequences[name], computed, computed + output.num_scheduled_tokens[name])
            for name, computed in self._computed(output)
        ]
        for sequence, start, stop in steps:
            self._write(sequence, start, stop)
        for sequence, _, stop in steps:
            self._read(sequence, stop)
        assert (self._slots_from(0) == POISON).all(), "a step wrote into a slot"

    def _follow(self, order: Any) -> None:
        before = self.borrower.increments
        self.borrower.follow(order)
        after, size = self.borrower.increments, self.boundary.block_bytes
        back = self.boundary.blocks(min(before, after), before)
        assert not self._bytes[back.start * size : back.stop * size].any(), "not zeroed"
        self._slots_from(before)[:] = POISON
        self._moves += 1
        if self._moves % CHECKED_MOVES == 0:
            self.borrower.check_integrity()

    def _slots_from(self, increments: int) -> NDArray[np.uint8]:
        """Bytes of the open slots beyond so many increments, which lie side by side."""
        size, opened = self.boundary.increment_bytes, self.borrower.increments
        if opened <= increments:
            return self._bytes[:0]
        start = self.boundary.row_offset(0, self.boundary.slots(0, opened).start)
        return self._bytes[start : start + (opened - increments) * size]

    def _note(self, output: Any) -> None:
        for name in output.finished_req_ids:
            self._sequences.pop(name, None)
        for new in output.scheduled_new_reqs:
            marks_P = marks(new.prompt_token_ids, self._max_tokens)
            self._sequences[new.req_id] = _Sequence(marks_P, list(new.block_ids[0]))
        cached = output.scheduled_cached_reqs
        for name, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            blocks = list(new_blocks[0]) if new_blocks else []
            if name in cached.resumed_req_ids:
                self._sequences[name].blocks = blocks
            else:
                self._sequences[name].blocks += blocks

    def _computed(self, output: Any) -> list[tuple[str, int]]:
        """Sequences of the step, and how many tokens each has had before."""
        cached = output.scheduled_cached_reqs
        found = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
        return [*found, *zip(cached.req_ids, cached.num_computed_tokens, strict=True)]

    def _write(self, sequence: _Sequence, start: int, stop: int) -> None:
        for position in range(start, stop):
            block, place = divmod(position, self._tokens_NCB.shape[1])
            self._tokens_NCB[sequence.blocks[block], place] = sequence.marks_P[position]

    def _read(self, sequence: _Sequence, stop: int) -> None:
        # Slots are far larger than a token: whoever writes one changes an end of it.
        ends_P2 = self._ends_NC2[sequence.blocks].reshape(-1, 2)
        kept = ends_P2[:stop] == sequence.marks_P[:stop, None]
        assert kept.all(), "keys and values are not what they were"
        assert not (ends_P2 == POISON).any(), "attention would read NaN"


def marks(prompt: Sequence[int], length: int) -> NDArray[np.uint8]:
    """A byte for each position of a sequence; neither 0 nor NaN."""
    state, found = 0, []
    for token in [*prompt, *[SAMPLED] * (length - len(prompt))]:
        state = (31 * state + token + 1) % 65_521
        found.append(1 + state % 250)
    return np.array(found, dtype=np.uint8)
