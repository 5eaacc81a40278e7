"""The steps of a replay: which tokens are resolved together, and which sequences end.

Legend: T tokens of the step, L layers, K choices a token, E experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vllm_moe_offload.simulate.cache import Bools, Ints
from vllm_moe_offload.trace import Trace


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine: one token of every sequence of the batch.

    ``index_T`` are the tokens' positions in the trace, ``sequence_T`` their sequences and
    ``ended`` those of them that have no further token. ``active_LE`` is what ``ids_TLK`` names.
    """

    number: int
    index_T: Ints
    sequence_T: Ints
    ids_TLK: Ints
    active_LE: Bools
    ended: tuple[int, ...]


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
    ids = trace.expert_ids.astype(np.int64)
    sequence_of = trace.sequence_of_token()
    is_last = np.zeros(trace.num_tokens, dtype=bool)
    is_last[trace.sequence_starts[1:][np.diff(trace.sequence_starts) > 0] - 1] = True
    layers = np.arange(trace.num_layers)[:, None]
    for number, index in enumerate(steps):
        ids_TLK, sequences = ids[index], sequence_of[index]
        active = np.zeros((trace.num_layers, trace.num_experts), dtype=bool)
        active[layers, ids_TLK] = True
        ended = tuple(sequences[is_last[index]].tolist())
        yield Step(number, index, sequences, ids_TLK, active, ended)
