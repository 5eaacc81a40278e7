"""The steps of a replay: which tokens are resolved together, and which sequences end.

Legend: T tokens of the step, L layers, K choices a token, E experts, N = T * L * K choices,
A different (layer, expert) pairs, S steps that are made ready together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_moe_offload.simulate.cache import Bools, Ints
from vllm_moe_offload.trace import Trace

_BLOCK_PAIRS = 1 << 15
"""Pairs of layer and expert, times steps, that are made ready together: what is computed for each
of them in 4 bytes fits a core's cache several times over."""

_BLOCK = 128
"""Steps that are made ready together."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some steps in a row, made ready together.

    ``active_SLE`` is what each step reads, ``reads_SL`` how many experts that are, and ``pair_A``
    lists them: a pair is an expert of a layer, as layer * E + expert.
    """

    active_SLE: Bools
    reads_SL: Ints
    pair_A: Ints


class Step(NamedTuple):
    """One step of the engine: one token of every sequence of the batch.

    ``index_T`` are the tokens' positions in the trace, ``sequence_T`` their sequences and
    ``ended`` those of them that have no further token. ``choice_N`` names the pair of every choice
    in ``ids_TLK``, and ``pair_A`` each pair once, in ascending order; ``active_LE`` marks them.
    ``place`` is where the step is in its block. A tuple, since millions of them are made.
    """

    number: int
    index_T: Ints
    sequence_T: Ints
    ids_TLK: Ints
    choice_N: Ints
    pair_A: Ints
    active_LE: Bools
    ended: tuple[int, ...]
    block: Block
    place: int


def steps_of_block(num_layers: int, num_experts: int) -> int:
    """Steps that are made ready together; the last block may have fewer."""
    return max(1, _BLOCK_PAIRS // (num_layers * num_experts))


def schedule(trace: Trace, batch: int) -> list[Ints]:
    """List for every step the tokens that are resolved together.

    Up to ``batch`` sequences run at once, one token each a step; where one ends, the next of the
    file takes its place in the following step. With a batch of 1 that is the order of the file.
    """
    bounds = list(zip(trace.sequence_starts[:-1], trace.sequence_starts[1:], strict=True))
    waiting = [(int(start), int(end)) for start, end in bounds if start < end]
    waiting.reverse()
    running: list[tuple[int, int]] = []
    steps = []
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.pop())
        steps.append(np.array([start for start, _ in running], dtype=np.int64))
        running = [(start + 1, end) for start, end in running if start + 1 < end]
    return steps


def iterate(trace: Trace, steps: list[Ints]) -> Iterator[Step]:
    """Walk through a schedule."""
    sequence_of = trace.sequence_of_token()
    is_last = np.zeros(trace.num_tokens, dtype=bool)
    is_last[trace.sequence_starts[1:][np.diff(trace.sequence_starts) > 0] - 1] = True
    layer_L1 = np.arange(trace.num_layers)[:, None]
    at_once = steps_of_block(trace.num_layers, trace.num_experts)
    for start in range(0, len(steps), at_once):
        indices = steps[start : start + at_once]
        index_T, lengths = np.concatenate(indices), [len(index) for index in indices]
        ids_TLK = trace.expert_ids[index_T].astype(np.int64)
        choice_TLK = ids_TLK + layer_L1 * trace.num_experts
        block = _block(trace, lengths, choice_TLK)
        pair_ends = block.reads_SL.sum(1).cumsum().tolist()
        last, pair, ended = 0, 0, is_last[index_T]
        for place, index in enumerate(indices):
            first, last = last, last + lengths[place]
            pair_A, pair = block.pair_A[pair : pair_ends[place]], pair_ends[place]
            sequence_T = sequence_of[index]
            yield Step(
                number=start + place,
                index_T=index,
                sequence_T=sequence_T,
                ids_TLK=ids_TLK[first:last],
                choice_N=choice_TLK[first:last].reshape(-1),
                pair_A=pair_A,
                active_LE=block.active_SLE[place],
                ended=tuple(sequence_T[ended[first:last]].tolist()),
                block=block,
                place=place,
            )


def _block(trace: Trace, lengths: list[int], choice_TLK: Ints) -> Block:
    """Mark what steps of so many tokens read."""
    steps, pairs = len(lengths), trace.num_layers * trace.num_experts
    active = np.zeros((steps, pairs), dtype=bool)
    step_T = np.repeat(np.arange(steps), lengths)
    active[step_T[:, None], choice_TLK.reshape(len(step_T), -1)] = True
    active_SLE = active.reshape(steps, trace.num_layers, trace.num_experts)
    pair_A = np.flatnonzero(active) % pairs
    return Block(active_SLE, np.count_nonzero(active_SLE, axis=-1), pair_A)
