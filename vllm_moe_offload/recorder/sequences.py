"""Sort the rows of steps into sequences.

Three things make this more than a sort. A position may be computed twice, after a preemption or
because a draft was wrong: of a sure token the first row counts, of a draft the one that was not
followed by another token at its position. A step may have been dropped: then the sequence goes
on as another one. And what begins behind a hit in the prefix cache begins in its middle.

Legend: B blocks (a sequence's tokens in a step), N tokens kept, T tokens of all steps, L layers,
K choices a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.recorder.steps import RecordedStep, StepRows

_Ints = NDArray[np.int64]

_BEYOND = 1 << 40
"""Larger than any position."""


@dataclass(frozen=True, slots=True)
class SortedTokens:
    """Tokens of all sequences, one sequence after the other, each in order.

    ``sequence_N`` numbers what is to be one sequence of a trace; a number that was used before
    goes on where it ended.
    """

    sequence_N: _Ints
    ids_NLK: NDArray[np.uint8] | NDArray[np.uint16]
    is_decode_N: NDArray[np.bool_]


@dataclass(slots=True)
class _Sequence:
    """A sequence that goes on: positions below ``known`` are recorded, under ``number``."""

    prompt: int
    known: int = -1
    number: int = -1


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Tokens of one sequence in one step, int64 [B] each; ``row`` is the first one's."""

    sequence: _Ints
    start: _Ints
    count: _Ints
    drafts: _Ints
    row: _Ints

    def at(self, chosen: _Ints | NDArray[np.bool_]) -> "_Blocks":
        return _Blocks(*(getattr(self, name)[chosen] for name in self.__slots__))


class SequenceSorter:
    """Takes steps as they come, gives the tokens that have become sure.

    Args:
        num_experts: ids from 0 to below this are experts.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._dtype = np.uint8 if num_experts <= 1 << 8 else np.uint16
        self._sequences: dict[int, _Sequence] = {}
        self._held: list[RecordedStep] = []
        self._next_number = 0
        self.incomplete = 0
        """Tokens left out because their router chose fewer experts than others."""

    def add(self, steps: Sequence[RecordedStep]) -> SortedTokens | None:
        """Sort what steps recorded; None if no token has become sure.

        The last drafts of a sequence are held back until its next step tells how many of them
        were right. Those of a sequence that has ended are left out.
        """
        ended = {number for step in steps for number in step.rows.ended}
        for step in steps:
            for sequence, prompt in step.rows.begun:
                self._sequences[sequence] = _Sequence(prompt)
        steps = [*self._held, *(step for step in steps if step.ids_TLK is not None)]
        self._held = []
        tokens = self._sorted(steps, ended) if steps else None
        for sequence in ended:
            self._sequences.pop(sequence, None)
        return tokens

    def finish(self) -> SortedTokens | None:
        """End all sequences; the tokens that this makes sure."""
        return self.add([RecordedStep(StepRows(ended=tuple(self._sequences)))])

    def _sorted(self, steps: Sequence[RecordedStep], ended: set[int]) -> SortedTokens | None:
        ids_TLK = np.concatenate([step.ids_TLK for step in steps if step.ids_TLK is not None])
        blocks = _blocks(steps)
        blocks = blocks.at(np.argsort(blocks.sequence, kind="stable"))
        is_last = np.append(blocks.sequence[1:] != blocks.sequence[:-1], True)
        unsure = is_last & (blocks.drafts > 0) & ~np.isin(blocks.sequence, list(ended))
        self._hold(blocks.at(unsure), ids_TLK)

        stop = _sure_stop(blocks, is_last)
        states = [self._sequences[number] for number in blocks.sequence[is_last].tolist()]
        blocks, stop, group = (
            blocks.at(~unsure), stop[~unsure], (np.cumsum(is_last) - is_last)[~unsure]
        )  # fmt: skip
        known = _known_before(group, stop, np.array([state.known for state in states]))
        first = np.maximum(blocks.start, known)
        has_new = stop > first
        blocks, group, known, first, count = (
            blocks.at(has_new), group[has_new], known[has_new], first[has_new],
            (stop - first)[has_new],
        )  # fmt: skip
        if not count.size:
            return None
        number = self._numbers(states, group, begins=first > known)
        last = np.append(group[1:] != group[:-1], True)
        ends = (first + count)[last].tolist()
        for owner, end, last_number in zip(
            group[last].tolist(), ends, number[last].tolist(), strict=True
        ):
            states[owner].known, states[owner].number = end, last_number
        rows = _ranges(blocks.row + first - blocks.start, count)
        prompt = np.array([state.prompt for state in states])[group]
        is_decode = _ranges(first, count) >= np.repeat(prompt, count)
        return self._checked(np.repeat(number, count), ids_TLK[rows], is_decode)

    def _hold(self, blocks: _Blocks, ids_TLK: NDArray[np.int16]) -> None:
        """Keep blocks for the next time, with their rows."""
        if blocks.count.size:
            rows = StepRows(
                sequences_R=blocks.sequence.tolist(), starts_R=blocks.start,
                counts_R=blocks.count.tolist(), drafts_R=blocks.drafts.tolist(),
            )  # fmt: skip
            self._held = [RecordedStep(rows, ids_TLK[_ranges(blocks.row, blocks.count)])]

    def _numbers(
        self, states: Sequence[_Sequence], group: _Ints, begins: NDArray[np.bool_]
    ) -> _Ints:
        """Number each block's sequence in the trace: a new number wherever one begins."""
        fresh = self._next_number + np.cumsum(begins) - 1
        self._next_number += int(begins.sum())
        before = np.array([state.number for state in states])[group]
        is_set = begins | np.append(True, group[1:] != group[:-1])
        # The others go on with the number of the last block that has one of its own.
        source = np.maximum.accumulate(np.where(is_set, np.arange(group.size), 0))
        return np.where(begins, fresh, before)[source]

    def _checked(
        self, sequence_N: _Ints, ids_NLK: NDArray[np.int16], is_decode_N: NDArray[np.bool_]
    ) -> SortedTokens:
        whole_N = ((ids_NLK >= 0) & (ids_NLK < self._num_experts)).all((1, 2))
        self.incomplete += int((~whole_N).sum())
        ids: Any = ids_NLK[whole_N].astype(self._dtype)
        return SortedTokens(sequence_N[whole_N], ids, is_decode_N[whole_N])


def _blocks(steps: Sequence[RecordedStep]) -> _Blocks:
    def joined(columns: list[Any]) -> _Ints:
        return np.concatenate([np.asarray(column, np.int64) for column in columns])

    rows = [step.rows for step in steps]
    count = joined([row.counts_R for row in rows])
    row = np.cumsum(count) - count
    if any(step.positions_T is not None for step in steps):
        starts = [_starts(step) for step in steps]
    else:
        starts = [row.starts_R for row in rows]
    drafts = [np.zeros(len(row.counts_R)) if row.drafts_R is None else row.drafts_R
              for row in rows]  # fmt: skip
    return _Blocks(joined([row.sequences_R for row in rows]), joined(starts), count,
                   joined(drafts), row)  # fmt: skip


def _starts(step: RecordedStep) -> Any:
    if step.positions_T is None:
        return step.rows.starts_R
    counts = np.asarray(step.rows.counts_R)
    return step.positions_T[np.cumsum(counts) - counts]


def _sure_stop(blocks: _Blocks, is_last: NDArray[np.bool_]) -> _Ints:
    """End each block before the drafts that the sequence's next step computes anew."""
    end = blocks.start + blocks.count
    sure = end - blocks.drafts
    following = np.append(blocks.start[1:], 0)
    # Beyond the end there was a step that is not recorded, and would have known.
    unknown = is_last | (following > end)
    return np.where(unknown, sure, np.clip(following, sure, end))


def _known_before(group: _Ints, stop: _Ints, known: _Ints) -> _Ints:
    """Tell up to which position each block's sequence is known when it comes.

    Args:
        group: int64 [B], ascending: which of ``known`` belongs to a block.
        stop: int64 [B], where each block ends.
        known: what was known of each sequence before.
    """
    # One running maximum does for all, as a later sequence is beyond all of an earlier one.
    highest = np.maximum.accumulate(np.maximum(stop, known[group]) + group * _BEYOND)
    before = np.append(-1, highest[:-1]) - group * _BEYOND
    is_first = np.append(True, group[1:] != group[:-1])
    return np.where(is_first, known[group], before)


def _ranges(start: _Ints, count: _Ints) -> _Ints:
    """Join the ranges ``start .. start + count``."""
    offset = np.cumsum(count) - count
    return np.repeat(start - offset, count) + np.arange(int(count.sum()))
