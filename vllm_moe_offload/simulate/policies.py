"""Eviction policies: what each keeps of the past, and how it ranks the experts of a layer.

Legend: C cache sizes, T tokens of a step, L layers, K choices a token, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.predictors.collection import Collection, SequenceCounts
from vllm_moe_offload.simulate.adaptive import AdaptivePolicy
from vllm_moe_offload.simulate.cache import Bools, Floats, Ints, Scores, admit
from vllm_moe_offload.simulate.steps import Step
from vllm_moe_offload.trace import Trace

ENGINE_DEFAULT: str = MoeOffloadConfig.model_fields["policy"].default
"""What ``default`` means: the policy that the engine runs if nobody chooses."""

ALIAS = "default"


class Policy(Protocol):
    """Decides who is resident after a step; keeps its state over all sequences of a replay."""

    def replace(self, step: Step, resident_CLE: Bools, fetched_CLE: Bools) -> tuple[Bools, Scores]:
        """Learn from a step and give what it reads slots.

        Args:
            step: the experts that this step reads, and the sequences that end with it.
            resident_CLE: who was resident before the step, as the last call returned it.
            fetched_CLE: the same with what was prefetched for it; the same array without.

        Returns:
            Who is resident now, and the scores by which that was decided, [L, E] or [C, L, E]:
            the lowest among the residents that the step does not read is evicted first.
        """
        ...


class Ranking:
    """A policy whose caches differ by nothing but their contents: it only scores the experts."""

    entry_E: Ints | None = None
    """Scores by which missing experts compete for the slots; None if those of ``rank`` decide."""

    bypass = False
    """Whether an active expert may pass through although a resident could be evicted."""

    slots_C: Ints
    """Slots of a layer for each cache size."""

    def rank(self, step: Step, resident_CLE: Bools) -> Scores:
        """Learn from a step and score the experts for it, as ``Policy`` tells."""
        raise NotImplementedError

    def replace(self, step: Step, resident_CLE: Bools, fetched_CLE: Bools) -> tuple[Bools, Scores]:
        """Evict by the scores."""
        score = self.rank(step, resident_CLE)
        after = admit(
            fetched_CLE,
            step.active_LE,
            score,
            self.slots_C,
            entry_LE=self.entry_E,
            bypass=self.bypass,
        )
        return after, score


def lower_id_first(score: Ints) -> Ints:
    """Make ranks of scores [..., E]: among equals the lower expert has the lower one."""
    experts = score.shape[-1]
    return score * experts + np.arange(experts)


class LruPolicy(Ranking):
    """Least recently used, as ``kernels.resolve`` does it: hit for hit the same.

    All missing experts are used now, so the lower ids get the slots.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.entry_E = -np.arange(num_experts)
        self.stamp_LE = np.full((num_layers, num_experts), -1)
        self._clock = 0

    def rank(self, step: Step, resident_CLE: Bools) -> Ints:
        """Score is the time of the last use."""
        self.note(step)
        return lower_id_first(self.stamp_LE)

    def note(self, step: Step) -> None:
        """Note the uses of a step."""
        self.stamp_LE[step.active_LE] = self._clock
        self._clock += 1


class LfuPolicy(Ranking):
    """Least frequently used, where every step fades the older uses.

    LRFU (Lee et al., IEEE Transactions on Computers 50(12), 2001) with a fixed factor.
    """

    DECAY = 0.98

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._count_LE = np.zeros((num_layers, num_experts))
        self._layers = np.arange(num_layers)[:, None]

    def rank(self, step: Step, resident_CLE: Bools) -> Floats:
        """Score is the faded number of uses."""
        self._count_LE *= self.DECAY
        for ids_LK in step.ids_TLK:
            self._count_LE[self._layers, ids_LK] += 1
        return self._count_LE


class LeastStalePolicy(Ranking):
    """Experts that the last forward pass did not read go first, in the order they came.

    Least-Stale of SpecMD (arXiv 2602.03921) for a cache a layer: there everything that the
    layer's last two passes left alone is stale, so that what remains of the policy is its
    first-in first-out order among the stale.
    """

    _FRESH = 1 << 32

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._before_LE = np.zeros((num_layers, num_experts), dtype=bool)
        self._came_CLE = np.zeros((1, num_layers, num_experts), dtype=np.int64)

    def rank(self, step: Step, resident_CLE: Bools) -> Ints:
        """Score is the time of entry, and more than any such time if read by the last pass."""
        missing = step.active_LE & ~resident_CLE
        self._came_CLE = np.where(missing, step.number, self._came_CLE)
        score = self._came_CLE + self._FRESH * self._before_LE
        self._before_LE = step.active_LE
        return lower_id_first(score)


class EamPolicy(Ranking):
    """MoE-Infinity's Algorithm 1 (arXiv 2401.14361v3), for a cache a layer.

    A token's activations so far are matched with those of past sequences; the likelihood of an
    expert is its share in the matched matrix. The factor (1 - layer / L) is the same for all
    experts of a layer, so it decides nothing here. Where nothing is known (no sequence has
    ended, or equal shares) the least recently used goes first.
    """

    EPSILON = 1e-3
    """Below the smallest share that is told from none; times a rank of recency within 0 to 1."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._collection = Collection(num_layers, num_experts)
        self._running = SequenceCounts(num_layers, num_experts)
        self._recency = LruPolicy(num_layers, num_experts)

    def rank(self, step: Step, resident_CLE: Bools) -> Floats:
        """Score is the likelihood, summed over the tokens of the step."""
        self._recency.note(step)
        stamp_LE = self._recency.stamp_LE
        score_LE = stamp_LE * (self.EPSILON / (step.number + 1))
        if self._collection.size:
            best_TL = self._collection.match(step.ids_TLK)
            for share_LE in self._collection.rows(best_TL, 0):
                score_LE += share_LE
        for sequence, ids_LK in zip(step.sequence_T.tolist(), step.ids_TLK, strict=True):
            self._running.count(sequence, ids_LK)
        for sequence in step.ended:
            matrix = self._running.finish(sequence)
            assert matrix is not None
            self._collection.add(matrix)
        return score_LE


class BeladyPolicy(Ranking):
    """Furthest next use goes first, active experts included: the upper bound.

    Belady (IBM Systems Journal 5(2), 1966), with the schedule known from the trace.
    """

    bypass = True

    def __init__(self, trace: Trace, steps: Sequence[Ints]) -> None:
        self._layers = np.arange(trace.num_layers)[:, None]
        never = len(steps)
        self._next_LE = np.full((trace.num_layers, trace.num_experts), never, dtype=np.int64)
        self._next_use_TLK = self._look_ahead(trace, steps)

    def _look_ahead(self, trace: Trace, steps: Sequence[Ints]) -> Ints:
        """For every token and choice the step of that expert's next use."""
        coming_LE = self._next_LE.copy()
        next_use = np.empty(trace.expert_ids.shape, dtype=np.int64)
        for number in range(len(steps) - 1, -1, -1):
            ids_TLK = trace.expert_ids[steps[number]]
            next_use[steps[number]] = coming_LE[self._layers, ids_TLK]
            coming_LE[self._layers, ids_TLK] = number
        return next_use

    def rank(self, step: Step, resident_CLE: Bools) -> Ints:
        """Score is how soon the next use comes."""
        self._next_LE[self._layers, step.ids_TLK] = self._next_use_TLK[step.index_T]
        return lower_id_first(-self._next_LE)


_BY_SHAPE: dict[str, Callable[[int, int], Ranking]] = {
    "lru": LruPolicy,
    "lfu": LfuPolicy,
    "eam": EamPolicy,
    "least-stale": LeastStalePolicy,
}

POLICIES = (*_BY_SHAPE, "adaptive", "belady")


def check_policy(name: str) -> None:
    """Raise unless there is such a policy."""
    if name not in (*POLICIES, ALIAS):
        raise OffloadError(
            "--policy", name, "there is no such policy", f"Give {', '.join(POLICIES)} or {ALIAS}"
        )


def make_policy(name: str, trace: Trace, steps: Sequence[Ints], slots_C: Ints) -> Policy:
    """Make a policy for one replay.

    Args:
        name: one of ``POLICIES``, or ``default``.
        trace: what will be replayed.
        steps: its schedule; only the upper bound looks into it.
        slots_C: slots of a layer for each cache size.

    Raises:
        OffloadError: there is no such policy.
    """
    check_policy(name)
    name = ENGINE_DEFAULT if name == ALIAS else name
    if name == "adaptive":
        return AdaptivePolicy(trace.num_layers, trace.num_experts, slots_C)
    ranking = (
        BeladyPolicy(trace, steps)
        if name == "belady"
        else _BY_SHAPE[name](trace.num_layers, trace.num_experts)
    )
    ranking.slots_C = slots_C
    return ranking
