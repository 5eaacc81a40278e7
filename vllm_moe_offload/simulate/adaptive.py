"""The adaptive eviction policy, hit for hit as the engine's ``kernels.learn`` runs it.

Legend: C cache sizes, F time constants, M candidates, L layers, E experts, A the (layer, expert)
pairs that a step reads.
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
    OPENING_LEADER,
    SEQUEL,
    SEQUEL_MIXTURE,
    SEQUEL_SCALE,
    SEQUEL_SHIFT,
    SEQUEL_UNIT,
    SOON,
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
        self._sequels = _Sequels(num_layers, num_experts)
        self._rank_MLE = np.zeros((CANDIDATES, *shape), dtype=np.int32) + self._expert_E
        self._held_CMLE = np.zeros((sizes, CANDIDATES, *shape), dtype=bool)
        self._are_full = False
        self._votes_CM = np.zeros((sizes, CANDIDATES), dtype=np.float32)
        self._leader_C = np.full(sizes, OPENING_LEADER)
        self._balance_C = np.full(sizes, OPENING_CREDIT * num_layers)

    def rank(self, step: Step, resident_CLE: Bools) -> Ranks:
        """Score by what was known before the step, and learn from it for the next."""
        free_CL = self._free_layers(step.number, resident_CLE)
        as_lru_CLE = self._rank_MLE[LRU] + np.int32(FIRST) * self._held_CMLE[:, LRU]
        score_CLE = np.where(free_CL[..., None], self._rank_MLE[self._leader_C], as_lru_CLE)
        self._adopt(resident_CLE)
        self._vote(step.active_LE, resident_CLE)
        self._admit(step.active_LE)
        self._take_in(step.active_LE)
        return score_CLE

    def _free_layers(self, number: int, resident_CLE: Bools) -> Bools:
        """Layers [C, L] that may evict by the leader's order, in turn if not all may."""
        deviation_C = np.count_nonzero(self._held_CMLE[:, LRU] & ~resident_CLE, axis=(1, 2))
        turn_L = (self._layers + STRIDE * number) % len(self._layers)
        price_CL = DEVIATION_PRICE * (1 + turn_L + deviation_C[:, None])
        return price_CL <= self._balance_C[:, None]

    def _adopt(self, resident_CLE: Bools) -> None:
        """No slot opens or closes here, so the real cache is full if a candidate's is."""
        if self._are_full:
            return
        full_CML = self._held_CMLE.sum(-1) == self._slots_C[:, None, None]
        self._are_full = bool(full_CML.all())
        held_CMLE = np.where(full_CML[..., None], self._held_CMLE, resident_CLE[:, None])
        self._held_CMLE = held_CMLE

    def _vote(self, active_LE: Bools, resident_CLE: Bools) -> None:
        layer_A, expert_A = np.nonzero(active_LE)
        hits_CM = np.count_nonzero(self._held_CMLE[..., layer_A, expert_A], axis=-1)
        hits_C = np.count_nonzero(resident_CLE[:, layer_A, expert_A], axis=-1)
        most_C = HIT * len(self._layers) * (self._slots_C + 1)
        gained_C = HIT * (hits_C - hits_CM[:, LRU]) + LOSS_RATE * len(layer_A)
        self._balance_C = np.minimum(self._balance_C + gained_C, most_C)
        self._votes_CM *= np.float32(VOTE_FADE)
        self._votes_CM += hits_CM.astype(np.float32)
        best_C = self._votes_CM.argmax(-1)
        sizes = np.arange(len(best_C))
        ahead_C = self._votes_CM[sizes, best_C] - self._votes_CM[sizes, self._leader_C]
        follow_C = ahead_C > np.float32(SWITCH_MARGIN * len(self._layers))
        self._leader_C = np.where(follow_C, best_C, self._leader_C)

    def _admit(self, active_LE: Bools) -> None:
        """Let every candidate's cache evict by its own order."""
        sizes, _, *shape = self._held_CMLE.shape
        held = self._held_CMLE.reshape(-1, *shape)
        score = np.broadcast_to(self._rank_MLE, self._held_CMLE.shape).reshape(held.shape)
        slots = np.repeat(self._slots_C, CANDIDATES)
        self._held_CMLE = admit(held, active_LE, score, slots).reshape(sizes, -1, *shape)

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
        for rank_LE, mixture in zip(rank_MLE[LRU + 1 : SEQUEL], MIXTURES, strict=True):
            rank_LE[:] = self._ranked(self._mixed(mixture))
        in_units_LE = (self._mixed(SEQUEL_MIXTURE) * np.float32(SEQUEL_UNIT)).astype(np.int32)
        in_units_LE *= np.count_nonzero(active_LE, axis=-1).astype(np.int32)[:, None]
        expected_LE = self._sequels.expected(active_LE) + in_units_LE
        rank_MLE[SEQUEL] = self._ranked(expected_LE.astype(np.float32) * np.float32(SEQUEL_SCALE))

    def _mixed(self, mixture: tuple[float, ...]) -> NDArray[np.float32]:
        terms = (np.float32(w) * self._average_FLE[f] for f, w in enumerate(mixture) if w)
        return np.asarray(sum(terms), dtype=np.float32)

    def _ranked(self, score_LE: NDArray[np.float32]) -> Ranks:
        return (score_LE.view(np.int32) & -(1 << EXPERT_BITS)) | self._expert_E


class _Sequels:
    """Knows for each pair of a layer's experts how often one is used soon after the other."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._history_LE = np.zeros((num_layers, num_experts), dtype=np.int32)
        self._sequel_LEE = np.zeros((num_layers, num_experts, num_experts), dtype=np.int16)

    def expected(self, active_LE: Bools) -> Ranks:
        """Note a step, and sum up what its experts expect of each other one soon, [L, E]."""
        history_LE = ((self._history_LE << 1) | active_LE) & ((1 << (SOON[-1] + 1)) - 1)
        self._history_LE = history_LE
        uses_LE = sum((history_LE >> n) & 1 for n in range(len(SOON)))
        layer_A, expert_A = np.nonzero(history_LE >> SOON[-1])
        sequel_AE = self._sequel_LEE[layer_A, expert_A].astype(np.int32)
        sequel_AE += (SEQUEL_UNIT * np.asarray(uses_LE)[layer_A] - sequel_AE) >> SEQUEL_SHIFT
        self._sequel_LEE[layer_A, expert_A] = sequel_AE
        layer_A, expert_A = np.nonzero(active_LE)
        asked_AE = self._sequel_LEE[layer_A, expert_A]
        # The pairs of a layer stand together, and every layer of a step reads something.
        first_L = np.searchsorted(layer_A, np.arange(len(active_LE)))
        return np.add.reduceat(asked_AE, first_L, dtype=np.int32)
