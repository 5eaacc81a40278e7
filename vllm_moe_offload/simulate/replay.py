"""Replay of a trace against caches of several sizes.

Legend: C cache sizes, T tokens of a step, L layers, K choices a token, E experts.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_moe_offload.budget import slots_for_share
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.simulate.cache import Bools, Ints, Scores, admit
from vllm_moe_offload.simulate.policies import make_policy
from vllm_moe_offload.simulate.predictors import Guesses
from vllm_moe_offload.simulate.steps import Step, iterate, schedule
from vllm_moe_offload.trace import Trace


@dataclass(frozen=True, eq=False)
class Replay:
    """What was counted, for each cache size.

    An access is one choice of one token in one layer; a load is an expert that a step reads,
    once for all tokens of the step.
    """

    tokens: int
    accesses: int
    hits_C: Ints
    loads: int
    load_hits_C: Ints
    fetched_C: Ints
    wasted_C: Ints
    seconds: float

    def hit_ratio(self, size: int) -> float:
        """Hits by accesses."""
        return int(self.hits_C[size]) / max(1, self.accesses)

    def load_hit_ratio(self, size: int) -> float:
        """Resident experts by the experts that the steps read."""
        return int(self.load_hits_C[size]) / max(1, self.loads)

    def moved(self, size: int) -> int:
        """Experts that crossed the bus, prefetched ones included."""
        return self.loads - int(self.load_hits_C[size]) + int(self.fetched_C[size])


def slots_of(trace: Trace, cache: float) -> int:
    """Slots of a layer for a share of its experts.

    Raises:
        OffloadError: the share is not between 0 and 1.
    """
    if not 0 <= cache <= 1:
        raise OffloadError("--cache", cache, "it is no share", "Give numbers from 0 to 1")
    return slots_for_share(cache, trace.num_experts)


def replay(
    trace: Trace,
    policy: str,
    caches: Sequence[float],
    *,
    batch: int = 1,
    guesses: Guesses | None = None,
) -> Replay:
    """Replay a trace; each layer has its own slots, and nothing is resident at the start.

    Args:
        trace: what to replay.
        policy: name of the eviction policy.
        caches: shares of a layer's experts that have a slot.
        batch: sequences that run at once.
        guesses: experts that are prefetched before each step, guessed with the same batch.
    """
    steps = schedule(trace, batch)
    slots_C = np.array([slots_of(trace, cache) for cache in caches], dtype=np.int64)
    ranking = make_policy(policy, trace, steps, slots_C)
    counts = _Counts(len(slots_C))
    shape = (len(slots_C), trace.num_layers, trace.num_experts)
    resident: Bools = np.zeros(shape, dtype=bool)
    score: Scores = np.zeros(shape[1:])
    start = time.perf_counter()
    for step in iterate(trace, steps):
        fetched = resident
        if guesses is not None:
            fetched = admit(resident, guesses.before(step), score, slots_C)
            counts.add_prefetch(fetched & ~resident, step)
        counts.add(step, fetched)
        resident, score = ranking.replace(step, resident, fetched)
    return counts.result(trace, time.perf_counter() - start)


class _Counts:
    def __init__(self, sizes: int) -> None:
        self._hits, self._load_hits, self._fetched, self._wasted = np.zeros((4, sizes), np.int64)
        self._loads = 0

    def add_prefetch(self, fetched_CLE: Bools, step: Step) -> None:
        wasted_CLE = fetched_CLE & ~step.active_LE
        for size, (fetched, wasted) in enumerate(zip(fetched_CLE, wasted_CLE, strict=True)):
            self._fetched[size] += np.count_nonzero(fetched)
            self._wasted[size] += np.count_nonzero(wasted)

    def add(self, step: Step, resident_CLE: Bools) -> None:
        resident_CA = resident_CLE.reshape(len(resident_CLE), -1)
        load_hits_C = hits_C = resident_CA.take(step.pair_A, axis=1).sum(1)
        if step.choice_N.size != step.pair_A.size:
            hits_C = resident_CA.take(step.choice_N, axis=1).sum(1)
        self._hits += hits_C
        self._loads += step.pair_A.size
        self._load_hits += load_hits_C

    def result(self, trace: Trace, seconds: float) -> Replay:
        return Replay(
            tokens=trace.num_tokens,
            accesses=trace.expert_ids.size,
            hits_C=self._hits,
            loads=self._loads,
            load_hits_C=self._load_hits,
            fetched_C=self._fetched,
            wasted_C=self._wasted,
            seconds=seconds,
        )
