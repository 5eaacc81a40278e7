"""Our own eviction policy: follow what would have hit, as far as LRU cannot be lost to.

Legend: C cache sizes, F time constants, M candidate orders, L layers, E experts, A the
(layer, expert) pairs that a step reads.
"""

import numpy as np

from vllm_moe_offload.simulate.cache import Bools, Floats, Ints, admit
from vllm_moe_offload.simulate.steps import Step

HALF_LIVES = (4.0, 32.0, 512.0)
"""Steps after which a use counts half, of the three averages kept for every expert."""

MIXTURES = (
    (1.0, 0.0, 0.0),
    (0.0, 1.0, 0.0),
    (0.0, 0.0, 1.0),
    (0.5, 0.5, 0.0),
    (0.5, 0.0, 0.5),
    (0.0, 0.5, 0.5),
)
"""Candidate orders beside LRU: weights of the averages."""

VOTE_HALF_LIFE = 200.0
"""Steps after which a vote for a candidate counts half."""

SWITCH_MARGIN = 0.25
"""Votes a layer by which another candidate must be ahead to be followed."""

LOSS_RATE = 0.001
"""Hits an access that may be lost to LRU in the long run."""

OPENING_CREDIT = 0.05
"""Hits a layer that may be lost to LRU at the start."""

DEVIATION_PRICE = 0.7
"""Hits that an expert is expected to cost which LRU would hold and this cache does not."""

_STRIDE = 7
"""Layers by which the turn to deviate moves from step to step."""


class AdaptivePolicy:
    """Follows the best of several orders of the experts, within a credit against LRU.

    Candidates are LRU and mixtures of three exponential averages of an expert's use (LRFU, Lee
    et al. 2001, whose one time constant here becomes several). Every step votes: had the cache
    held the first S experts in a candidate's order, how many of the active ones would it have
    hit? Knowing every expert's state, resident or not, makes the ghost lists of ARC (Megiddo
    and Modha, FAST 2003) needless. The one with the most faded votes leads, as the cheaper
    expert does in LeCaR (Vietri et al., HotStorage 2018), but all layers vote together, so that
    a few dozen tokens decide.

    Votes can be wrong, so LRU's own cache is kept as a set of experts beside the real one.
    ``lead`` counts the real hits above those of LRU; ``deviation`` the experts that LRU holds
    and the cache does not, each of which can cost one hit before both agree again. A layer
    evicts by the leader's order only while

        DEVIATION_PRICE * deviation <= lead + LOSS_RATE * accesses + OPENING_CREDIT * L

    and else lets go what LRU does not hold, oldest first, which never adds to the deviation.
    So a wrong leader costs about LOSS_RATE of the accesses, and gains pay for more freedom.

    Args:
        num_layers: L.
        num_experts: E.
        slots_C: slots of a layer for each cache size; each size learns apart.
    """

    bypass = False

    def __init__(self, num_layers: int, num_experts: int, slots_C: Ints) -> None:
        sizes, candidates = len(slots_C), 1 + len(MIXTURES)
        self._slots_C = slots_C
        self._fade_F11 = 0.5 ** (1 / np.array(HALF_LIVES)).reshape(-1, 1, 1)
        self._mix_MF = np.array(MIXTURES)
        self._layers = np.arange(num_layers)
        self._stamp_LE = np.full((num_layers, num_experts), -1.0)
        self._average_FLE = np.zeros((len(HALF_LIVES), num_layers, num_experts))
        self._order_MLE = np.zeros((candidates, num_layers, num_experts))
        self._lru_CLE = np.zeros((sizes, num_layers, num_experts), dtype=bool)
        self._votes_CM = np.zeros((sizes, candidates))
        self._leader_C = np.zeros(sizes, dtype=np.int64)
        self._lead_C = np.zeros(sizes, dtype=np.int64)
        self._accesses = 0
        self._clock = 0

    def rank(self, step: Step, resident_CLE: Bools) -> Floats:
        """Score by the leader's order where a layer is free to, and by LRU's cache elsewhere."""
        free_CL = self._free_layers(step.number, resident_CLE)
        leader_C = self._leader_C.copy()
        self._count_hits(step.active_LE, resident_CLE)
        self._vote(step.active_LE)
        self._learn(step)
        self._lru_CLE = admit(self._lru_CLE, step.active_LE, self._stamp_LE, self._slots_C)
        above_all = float(self._clock)
        as_lru_CLE = self._stamp_LE + above_all * self._lru_CLE
        return np.where(free_CL[..., None], self._order_MLE[leader_C], as_lru_CLE)

    def _free_layers(self, number: int, resident_CLE: Bools) -> Bools:
        """Layers [C, L] that may evict by the leader's order, in turn if not all may."""
        num_layers = len(self._layers)
        deviation_C = (self._lru_CLE & ~resident_CLE).sum((1, 2))
        allowed = self._lead_C + LOSS_RATE * self._accesses + OPENING_CREDIT * num_layers
        credit_C = allowed - DEVIATION_PRICE * deviation_C
        turn_L = (self._layers + _STRIDE * number) % num_layers
        return turn_L < credit_C[:, None] / DEVIATION_PRICE

    def _count_hits(self, active_LE: Bools, resident_CLE: Bools) -> None:
        ours = (resident_CLE & active_LE).sum((1, 2))
        self._lead_C += ours - (self._lru_CLE & active_LE).sum((1, 2))
        self._accesses += int(active_LE.sum())

    def _vote(self, active_LE: Bools) -> None:
        """Count for each candidate the hits of a cache that held its first experts."""
        layer_A, expert_A = np.nonzero(active_LE & (self._stamp_LE >= 0))
        order_MA = self._order_MLE[:, layer_A, expert_A]
        ascending_MLE = np.sort(self._order_MLE, -1)
        num_experts = active_LE.shape[1]
        last_C = np.clip(num_experts - self._slots_C, 0, num_experts - 1)
        last_CMA = ascending_MLE[:, layer_A][..., last_C].transpose(2, 0, 1)
        self._votes_CM *= 0.5 ** (1 / VOTE_HALF_LIFE)
        self._votes_CM += (order_MA >= last_CMA).sum(-1)
        best_C = self._votes_CM.argmax(-1)
        sizes = np.arange(len(best_C))
        ahead_C = self._votes_CM[sizes, best_C] - self._votes_CM[sizes, self._leader_C]
        follow = ahead_C > SWITCH_MARGIN * len(self._layers)
        self._leader_C = np.where(follow, best_C, self._leader_C)

    def _learn(self, step: Step) -> None:
        self._stamp_LE[step.active_LE] = self._clock
        self._clock += 1
        self._average_FLE *= self._fade_F11
        self._average_FLE += (1 - self._fade_F11) * step.active_LE
        # Of equally old experts the one with the lower id goes first, as in ``admit``.
        num_experts = self._stamp_LE.shape[1]
        self._order_MLE[0] = self._stamp_LE + np.arange(num_experts) / num_experts
        # What a step reads is in the cache after it, whatever the order: it ranks first.
        self._order_MLE[1:] = np.tensordot(self._mix_MF, self._average_FLE, axes=1)
        self._order_MLE[1:] += step.active_LE
