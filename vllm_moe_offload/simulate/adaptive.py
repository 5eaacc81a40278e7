"""The adaptive eviction policy, hit for hit as the engine's ``kernels.learn`` runs it.

Legend: C cache sizes, F time constants, M candidate orders, L layers, E experts, A the
(layer, expert) pairs that a step reads.
"""

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.kernels.candidates import (
    CANDIDATES,
    DEVIATION_PRICE,
    EXPERT_BITS,
    FADES,
    FAINT,
    FIRST,
    GAINS,
    HIT,
    LOSS_RATE,
    LRU,
    MAX_AGE,
    MIXTURES,
    OPENING_CREDIT,
    STRIDE,
    SWITCH_MARGIN,
    VOTE_FADE,
)
from vllm_moe_offload.simulate.cache import Bools, Ints, admit
from vllm_moe_offload.simulate.steps import Step

Ranks = NDArray[np.int32]


class AdaptivePolicy:
    """Follows the best of several orders of the experts, within a credit against LRU.

    The algorithm is described where it runs, in ``kernels.learn``.

    Args:
        num_layers: L.
        num_experts: E.
        slots_C: slots of a layer for each cache size; each size learns apart.
    """

    bypass = False

    def __init__(self, num_layers: int, num_experts: int, slots_C: Ints) -> None:
        sizes, shape = len(slots_C), (num_layers, num_experts)
        self._slots_C = slots_C
        self._layers = np.arange(num_layers)
        self._expert_E = np.arange(num_experts, dtype=np.int32)
        self._fade_F11, self._gain_F11 = (
            np.array(factors, dtype=np.float32).reshape(-1, 1, 1) for factors in (FADES, GAINS)
        )
        self._average_FLE = np.zeros((len(FADES), *shape), dtype=np.float32)
        self._rank_MLE = np.zeros((CANDIDATES, *shape), dtype=np.int32) + self._expert_E
        self._key_MLE = np.full_like(self._rank_MLE, -1)
        self._last_CML = np.zeros((sizes, CANDIDATES, num_layers), dtype=np.int32)
        self._lru_CLE = np.zeros((sizes, *shape), dtype=bool)
        self._votes_CM = np.zeros((sizes, CANDIDATES), dtype=np.float32)
        self._leader_C = np.full(sizes, LRU)
        self._balance_C = np.full(sizes, OPENING_CREDIT * num_layers)

    def rank(self, step: Step, resident_CLE: Bools) -> Ranks:
        """Score by what was known before the step, and learn from it for the next."""
        free_CL = self._free_layers(step.number, resident_CLE)
        as_lru_CLE = self._rank_MLE[LRU] + np.int32(FIRST) * self._lru_CLE
        score_CLE = np.where(free_CL[..., None], self._rank_MLE[self._leader_C], as_lru_CLE)
        self._adopt(resident_CLE)
        self._count_hits(step.active_LE, resident_CLE)
        self._vote(step.active_LE)
        self._lru_CLE = admit(self._lru_CLE, step.active_LE, self._rank_MLE[LRU], self._slots_C)
        self._take_in(step.active_LE)
        return score_CLE

    def _free_layers(self, number: int, resident_CLE: Bools) -> Bools:
        """Layers [C, L] that may evict by the leader's order, in turn if not all may."""
        deviation_C = (self._lru_CLE & ~resident_CLE).sum((1, 2))
        turn_L = (self._layers + STRIDE * number) % len(self._layers)
        price_CL = DEVIATION_PRICE * (1 + turn_L + deviation_C[:, None])
        return price_CL <= self._balance_C[:, None]

    def _adopt(self, resident_CLE: Bools) -> None:
        """No slot opens or closes here, so the real cache is full if LRU's is."""
        full_CL = self._lru_CLE.sum(-1) == self._slots_C[:, None]
        if not full_CL.all():
            self._lru_CLE = np.where(full_CL[..., None], self._lru_CLE, resident_CLE)

    def _count_hits(self, active_LE: Bools, resident_CLE: Bools) -> None:
        lead_C = (resident_CLE & active_LE).sum((1, 2)) - (self._lru_CLE & active_LE).sum((1, 2))
        most_C = HIT * len(self._layers) * (self._slots_C + 1)
        balance_C = self._balance_C + HIT * lead_C + LOSS_RATE * int(active_LE.sum())
        self._balance_C = np.minimum(balance_C, most_C)

    def _vote(self, active_LE: Bools) -> None:
        layer_A, expert_A = np.nonzero(active_LE)
        held_CMA = self._key_MLE[:, layer_A, expert_A] >= self._last_CML[..., layer_A]
        self._votes_CM *= np.float32(VOTE_FADE)
        self._votes_CM += held_CMA.sum(-1).astype(np.float32)
        best_C = self._votes_CM.argmax(-1)
        sizes = np.arange(len(best_C))
        ahead_C = self._votes_CM[sizes, best_C] - self._votes_CM[sizes, self._leader_C]
        follow_C = ahead_C > np.float32(SWITCH_MARGIN * len(self._layers))
        self._leader_C = np.where(follow_C, best_C, self._leader_C)

    def _take_in(self, active_LE: Bools) -> None:
        average_FLE = self._average_FLE
        used_LE = average_FLE[0] > 0
        average_FLE *= self._fade_F11
        np.maximum(average_FLE, np.float32(FAINT), out=average_FLE, where=used_LE)
        average_FLE += self._gain_F11 * active_LE
        rank_MLE = self._rank_MLE
        older_LE = np.maximum(rank_MLE[LRU] - (1 << EXPERT_BITS), self._expert_E)
        newest_E = (MAX_AGE << EXPERT_BITS) | self._expert_E
        rank_MLE[LRU] = np.where(active_LE, newest_E, older_LE)
        for rank_LE, mixture in zip(rank_MLE[LRU + 1 :], MIXTURES, strict=True):
            mixed_LE = sum(np.float32(w) * average_FLE[f] for f, w in enumerate(mixture) if w)
            bits_LE = np.asarray(mixed_LE).view(np.int32)
            rank_LE[:] = (bits_LE & -(1 << EXPERT_BITS)) | self._expert_E
        # What a step reads is in the cache after it, whatever the order: it ranks first.
        used_LE = average_FLE[0] > 0
        self._key_MLE = np.where(used_LE, rank_MLE + np.int32(FIRST) * active_LE, np.int32(-1))
        self._last_CML = self._last_kept()

    def _last_kept(self) -> Ranks:
        """Least key [C, M, L] of a cache that holds the first experts of an order."""
        experts = self._key_MLE.shape[-1]
        ascending_MLE = np.sort(self._key_MLE, -1)
        place_C = np.clip(experts - self._slots_C, 0, experts - 1)
        last_CML = np.moveaxis(ascending_MLE[..., place_C], -1, 0)
        return np.where(self._slots_C[:, None, None] > 0, np.maximum(last_CML, 0), 2 * FIRST - 1)
