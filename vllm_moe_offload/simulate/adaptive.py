"""The adaptive eviction policy, hit for hit as the engine's ``kernels.learn`` runs it.

Legend: C cache sizes, M candidates, R = M + 1 caches a size, L layers, E experts.
"""

import numpy as np

from vllm_moe_offload.kernels.candidates import (
    CANDIDATES,
    DEVIATION_PRICE,
    EXPERT_BITS,
    FIRST,
    HIT,
    LOSS_RATE,
    LRU,
    OPENING_CREDIT,
    OPENING_LEADER,
    STRIDE,
    SWITCH_MARGIN,
    VOTE_FADE,
)
from vllm_moe_offload.simulate.cache import Bools, Ints
from vllm_moe_offload.simulate.ghosts import OWN, GhostCaches
from vllm_moe_offload.simulate.orders import Orders, Ranks
from vllm_moe_offload.simulate.steps import Step

_LOWERED = FIRST - (1 << EXPERT_BITS)
"""Taken from a rank by recency it puts an expert behind all others; the sums fit 32 bits."""


class AdaptivePolicy:
    """Follows the best of several orders of the experts, within a credit against LRU.

    The algorithm is described where it runs, in ``kernels.learn``.

    Args:
        num_layers: L.
        num_experts: E.
        slots_C: slots of a layer for each cache size; each size learns apart.
    """

    def __init__(self, num_layers: int, num_experts: int, slots_C: Ints) -> None:
        self._slots_C, self._layers = slots_C, np.arange(num_layers)
        self._orders = Orders(num_layers, num_experts)
        self._caches = GhostCaches(CANDIDATES, num_layers, num_experts, slots_C)
        self._is_prefetched = False
        self._votes_CM = np.zeros((slots_C.size, CANDIDATES), dtype=np.float32)
        self._leaders = [OPENING_LEADER] * slots_C.size
        # Lists, since a handful of numbers is quicker without numpy.
        self._balances = [OPENING_CREDIT * num_layers] * slots_C.size
        self._more = [1] * slots_C.size
        self._most = (HIT * num_layers * (slots_C + 1)).tolist()

    def replace(self, step: Step, resident_CLE: Bools, fetched_CLE: Bools) -> tuple[Bools, Ranks]:
        """Rank by what was known before the step, and learn from it for the next."""
        caches, rank_MLE = self._caches, self._orders.before(step)
        score_CLE, by_id_CL = self._score(step.number, rank_MLE)
        # As long as nothing is prefetched a ghost that has empty slots holds what the cache does.
        if self._is_prefetched:
            caches.adopt()
        hits_CRL = caches.hits(step)
        self._vote(step, hits_CRL.sum(-1))
        self._note_contested(step, hits_CRL[:, OWN])
        if fetched_CLE is not resident_CLE:
            self._is_prefetched = True
            caches.put(fetched_CLE)
            hits_CRL = caches.hits(step)
        caches.admit(step, rank_MLE, score_CLE, by_id_CL, hits_CRL)
        return caches.held(OWN).copy(), score_CLE

    def _score(self, number: int, rank_MLE: Ranks) -> tuple[Ranks, Bools]:
        """Ranks by the leader's order where a layer may evict by it, elsewhere as LRU does.

        Also tells the layers that go by recency, in which ids decide who gets a slot.
        """
        lru_CLE, own_CLE = self._caches.held(LRU), self._caches.held(OWN)
        deviations = [np.count_nonzero(deviates_LE) for deviates_LE in lru_CLE & ~own_CLE]
        score_CLE: Ranks = rank_MLE[self._leaders]
        layers = self._layers.size
        by_id_CL = np.repeat(np.array(self._leaders) == LRU, layers).reshape(-1, layers)
        prices = [
            DEVIATION_PRICE * (layers * more + deviation)
            for more, deviation in zip(self._more, deviations, strict=True)
        ]
        if all(price <= balance for price, balance in zip(prices, self._balances, strict=True)):
            return score_CLE, by_id_CL
        # If not all layers may deviate they take turns.
        back_L = layers - 1 - (self._layers + STRIDE * number) % layers
        price_CL = np.array(prices)[:, None] - DEVIATION_PRICE * np.outer(self._more, back_L)
        size, layer = np.nonzero(price_CL > np.array(self._balances)[:, None])
        lowered = np.int32(_LOWERED) * ~lru_CLE[size, layer]
        score_CLE[size, layer] = rank_MLE[LRU, layer] - lowered
        by_id_CL[size, layer] = True
        return score_CLE, by_id_CL

    def _note_contested(self, step: Step, hits_CL: Ints) -> None:
        """Note how many slots of a layer, on average, more missing experts competed for."""
        reads_L, layers = step.block.reads_SL[step.place], self._layers.size
        if reads_L.max() <= self._slots_C.min():
            self._more = [1] * self._slots_C.size
            return
        left_CL = np.where(reads_L > self._slots_C[:, None], self._slots_C[:, None] - hits_CL, 0)
        self._more = (1 + left_CL.sum(-1) // layers).tolist()

    def _vote(self, step: Step, hits_CR: Ints) -> None:
        votes_CM = self._votes_CM
        votes_CM *= np.float32(VOTE_FADE)
        votes_CM += hits_CR[:, :OWN].astype(np.float32)
        margin = np.float32(SWITCH_MARGIN * self._layers.size)
        allowed = LOSS_RATE * step.pair_A.size
        for size, (votes_M, hits) in enumerate(zip(votes_CM, hits_CR.tolist(), strict=True)):
            balance = self._balances[size] + HIT * (hits[OWN] - hits[LRU]) + allowed
            self._balances[size] = min(balance, self._most[size])
            best = int(votes_M.argmax())
            if votes_M[best] - votes_M[self._leaders[size]] > margin:
                self._leaders[size] = best
