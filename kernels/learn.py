"""What a step teaches about eviction: the adaptive policy, for all layers at once.

It follows the best of several orders of the experts, as far as LRU cannot be lost to.

Candidates are LRU and mixtures of three exponential averages of an expert's use (LRFU, Lee et al.,
IEEE Transactions on Computers 50(12), 2001, whose one time constant here becomes several). Every
step votes: had the cache held the first S experts of a candidate's order, how many of the active
ones would it have hit? Knowing every expert's state, resident or not, makes the ghost lists of ARC
(Megiddo and Modha, FAST 2003) needless. The candidate with the most faded votes leads, as the
cheaper expert does in LeCaR (Vietri et al., HotStorage 2018), but all layers vote together, so that
a few dozen tokens decide.

Votes can be wrong, so LRU's own cache is kept as a set of experts beside the real one. The balance
counts the real hits above those of LRU, plus ``LOSS_RATE`` an access; the deviation counts the
experts that LRU holds and the cache does not, each of which can cost one hit before both agree
again. Layers evict by the leader's order, in turn, only as far as the balance covers the price of
the deviation, and else let go what LRU does not hold, oldest first, which never adds to the
deviation. So a wrong leader costs about ``LOSS_RATE`` of the accesses, and gains pay for more
freedom. The balance has a ceiling, so that no gain of yesterday pays for long losses of today.

Legend: L layers, E experts (the most of any layer), R orders of a layer (the candidates, and last
the one that follows LRU's cache), M candidates, F averages of a use, S slots, N figures of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
from torch import Tensor

from vllm_moe_offload.kernels._learn_triton import choose_kernel, learn_layers_kernel
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
from vllm_moe_offload.kernels.resolve import MAX_EXPERTS, NOWHERE, EvictionOrder, Use

AS_LRU = CANDIDATES
"""The last order: what LRU's cache does not hold goes first, oldest first."""

ORDERS = CANDIDATES + 1

FIGURES = 16
"""Places for the counts of one layer's step, see ``_learn_triton``."""


class Standing(IntEnum):
    """Positions in ``AdaptiveTables.standing``."""

    BALANCE = 0
    """What may be lost to LRU, in parts of a ``HIT``."""
    LEADER = 1
    """The candidate that is followed."""
    TURN = 2
    """Which layer deviates first, counted back from layer 0."""


@dataclass(frozen=True)
class AdaptiveTables:
    """Device state of the policy. Layers with fewer than E experts leave the end of a row alone.

    What resolve shares, see ``EvictionOrder``: ``slot_of_LE``, ``use_LE``, ``rank_LRE`` and
    ``row_L``, and ``slots_L`` (int32), the slots that are open.

    ``average_LFE`` (float32) holds the averages of an expert's use, faded for the next step;
    ``held_LE`` (int32) has bit ``m`` set where candidate ``m`` would hold an expert, and bit
    ``AS_LRU`` where LRU's cache does. ``votes_M`` (float32) are faded for the next step.
    ``standing`` (int64) is indexed by ``Standing``. ``figures_LN`` is scratch between the two
    launches; ``weight_FR``, ``fade_F`` and ``gain_F`` (float32) are constants.
    """

    slot_of_LE: Tensor
    slots_L: Tensor
    use_LE: Tensor
    rank_LRE: Tensor
    row_L: Tensor
    average_LFE: Tensor
    held_LE: Tensor
    votes_M: Tensor
    standing: Tensor
    figures_LN: Tensor
    weight_FR: Tensor
    fade_F: Tensor
    gain_F: Tensor

    @classmethod
    def empty(
        cls, num_experts: Sequence[int], num_slots: Sequence[int], device: torch.device
    ) -> "AdaptiveTables":
        """Tables for layers of so many experts and slots, with nobody resident or ever used."""
        layers, experts = len(num_experts), max(num_experts)

        def full(shape: tuple[int, ...], value: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        def float32(values: object) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        # The orders that are no mixture weigh nothing.
        weights_RF = [(0,) * len(FADES), *MIXTURES, (0,) * len(FADES)]
        tables = cls(
            slot_of_LE=full((layers, experts), NOWHERE, torch.int32),
            slots_L=torch.tensor(num_slots, dtype=torch.int32, device=device),
            use_LE=full((layers, experts), 0, torch.int8),
            rank_LRE=full((layers, ORDERS, experts), 0, torch.int32),
            row_L=full((layers,), 0, torch.int32),
            average_LFE=full((layers, len(FADES), experts), 0, torch.float32),
            held_LE=full((layers, experts), 0, torch.int32),
            votes_M=full((CANDIDATES,), 0, torch.float32),
            standing=full((len(Standing),), 0, torch.int64),
            figures_LN=full((layers, FIGURES), 0, torch.int32),
            weight_FR=float32(weights_RF).T.contiguous(),
            fade_F=float32(FADES),
            gain_F=float32(GAINS),
        )
        tables.forget()
        return tables

    @property
    def num_layers(self) -> int:
        """Layers that learn together."""
        return self.slots_L.numel()

    @property
    def num_experts(self) -> int:
        """Most experts of any layer."""
        return self.use_LE.shape[1]

    def forget(self) -> None:
        """Set everything learned to what it is at the start; residency and slots stay."""
        for table in (self.use_LE, self.average_LFE, self.held_LE, self.votes_M, self.standing):
            table.zero_()
        self.rank_LRE.copy_(torch.arange(self.num_experts, device=self.rank_LRE.device))
        self.row_L.fill_(AS_LRU)
        self.standing[Standing.LEADER] = LRU
        self.standing[Standing.BALANCE] = OPENING_CREDIT * self.num_layers

    def order(self, layer: int, num_experts: int) -> EvictionOrder:
        """What resolve needs of one layer, as views."""
        return EvictionOrder(
            slot_of_E=self.slot_of_LE[layer, :num_experts],
            use_E=self.use_LE[layer, :num_experts],
            rank_RE=self.rank_LRE[layer, :, :num_experts],
            row=self.row_L[layer : layer + 1],
            num_slots=self.slots_L[layer : layer + 1],
        )


def learn_torch(tables: AdaptiveTables) -> None:
    """Take in what a step read, and decide by which order each layer evicts in the next one.

    Called once a step, after the last layer. ``use_LE`` is taken from resolve and cleared. A layer
    that read nothing in this step, or swept, learns nothing.

    Args:
        tables: updated in place.
    """
    active_LE = (tables.use_LE & Use.ACTIVE) > 0
    cached_LE = (tables.use_LE & Use.RESIDENT) > 0
    reads_L1 = active_LE.any(1, keepdim=True)
    lru_LE = _adopted(tables, cached_LE, reads_L1)

    if bool(reads_L1.any()):
        votes_M = _vote(tables, active_LE)
        lead = (active_LE & cached_LE).sum() - (active_LE & lru_LE).sum()
        most = HIT * (tables.slots_L.sum() + tables.num_layers)
        gained = HIT * lead + LOSS_RATE * active_LE.sum()
        balance, leader, turn = tables.standing.unbind()
        balance.copy_(torch.minimum(balance + gained, most))
        leader.copy_(_leader(votes_M, leader, tables.num_layers))
        turn.copy_((turn + STRIDE) % tables.num_layers)
        tables.votes_M.copy_(votes_M * VOTE_FADE)

    lru_LE = _admitted(tables, lru_LE, active_LE)
    _take_in(tables, active_LE, lru_LE, reads_L1)
    tables.row_L.copy_(_rows(tables, lru_LE))
    tables.use_LE.zero_()


def _adopted(tables: AdaptiveTables, cached_LE: Tensor, reads_L1: Tensor) -> Tensor:
    """LRU's cache before the step, [L, E].

    As long as it has empty slots it has evicted nobody, and neither has the real one, so both
    hold the same; a sweep may have added to the real one. And slots that open or close would do
    so under LRU too. So it is the real one unless both are exactly full.
    """
    lru_LE = _bit(tables.held_LE, AS_LRU)
    slots_L1 = tables.slots_L[:, None]
    full_L1 = (lru_LE.sum(1, keepdim=True) == slots_L1) & (
        cached_LE.sum(1, keepdim=True) == slots_L1
    )
    return torch.where(full_L1 | ~reads_L1, lru_LE, cached_LE)


def _bit(held_LE: Tensor, bit: int) -> Tensor:
    return ((held_LE >> bit) & 1) > 0


def _vote(tables: AdaptiveTables, active_LE: Tensor) -> Tensor:
    """Add the hits that each candidate would have had to its faded votes, [M]."""
    hits = [(_bit(tables.held_LE, m) & active_LE).sum() for m in range(CANDIDATES)]
    return tables.votes_M + torch.stack(hits)


def _leader(votes_M: Tensor, leader: Tensor, num_layers: int) -> Tensor:
    """Return the candidate to follow; the first of equals, and only if it is well ahead."""
    best = torch.nonzero(votes_M == votes_M.max())[0, 0]
    return torch.where(votes_M[best] - votes_M[leader] > SWITCH_MARGIN * num_layers, best, leader)


def _admitted(tables: AdaptiveTables, lru_LE: Tensor, active_LE: Tensor) -> Tensor:
    """LRU's cache after the step, [L, E], by the rules of resolve."""
    missing_LE, evictable_LE = active_LE & ~lru_LE, lru_LE & ~active_LE
    room_L = tables.slots_L - lru_LE.sum(1)
    most_L = evictable_LE.sum(1)
    victims_L = (missing_LE.sum(1) - room_L).clamp(min=0).minimum(most_L)
    age_LE = torch.where(evictable_LE, tables.rank_LRE[:, LRU], 2 * FIRST - 1)
    evicted_LE = evictable_LE & (_position(age_LE) < victims_L[:, None])
    gets_slot_LE = missing_LE & (missing_LE.cumsum(1) <= (room_L + victims_L)[:, None])
    return (lru_LE & ~evicted_LE) | gets_slot_LE


def _position(key: Tensor) -> Tensor:
    """Position of each entry among its row's in ascending order; there must be no equals."""
    return key.argsort(-1).argsort(-1)


def _take_in(tables: AdaptiveTables, active_LE: Tensor, lru_LE: Tensor, reads_L1: Tensor) -> None:
    """Note the uses, rank the experts anew, and note whom each candidate would now hold."""
    gain_F1, fade_F1 = tables.gain_F[:, None], tables.fade_F[:, None]
    average_LFE = tables.average_LFE + gain_F1 * active_LE[:, None]
    used_LE = average_LFE[:, 0] > 0
    faded_LFE = (average_LFE * fade_F1).clamp(min=FAINT) * used_LE[:, None]

    expert_E = torch.arange(tables.num_experts, dtype=torch.int32, device=active_LE.device)
    older_LE = torch.maximum(tables.rank_LRE[:, LRU] - (1 << EXPERT_BITS), expert_E)
    recency_LE = torch.where(active_LE, (MAX_AGE << EXPERT_BITS) | expert_E, older_LE)
    rank_LRE = (_mixed(tables, average_LFE) & -(1 << EXPERT_BITS)) | expert_E
    rank_LRE[:, LRU] = recency_LE
    rank_LRE[:, AS_LRU] = recency_LE + FIRST * lru_LE

    # What a step reads is in the cache after it, whatever the order: it ranks first.
    key_LME = rank_LRE[:, :AS_LRU] + FIRST * active_LE[:, None]
    key_LME = torch.where(used_LE[:, None], key_LME, -1)
    is_held_LME = used_LE[:, None] & (_position(-key_LME) < tables.slots_L[:, None, None])
    bit_M1 = (1 << torch.arange(CANDIDATES, device=active_LE.device))[:, None]
    held_LE = (is_held_LME * bit_M1).sum(1) + (lru_LE << AS_LRU)

    reads_L11 = reads_L1[:, None]
    tables.average_LFE.copy_(torch.where(reads_L11, faded_LFE, tables.average_LFE))
    tables.rank_LRE.copy_(torch.where(reads_L11, rank_LRE, tables.rank_LRE))
    tables.held_LE.copy_(torch.where(reads_L1, held_LE, tables.held_LE))


def _mixed(tables: AdaptiveTables, average_LFE: Tensor) -> Tensor:
    """Bits of the weighted averages, int32 [L, R, E]: of floats above 0 they order alike."""
    terms_FLRE = tables.weight_FR[:, None, :, None] * average_LFE.transpose(0, 1)[:, :, None]
    total_LRE = terms_FLRE[0]
    for term_LRE in terms_FLRE[1:]:
        total_LRE = total_LRE + term_LRE
    return total_LRE.view(torch.int32)


def _rows(tables: AdaptiveTables, lru_LE: Tensor) -> Tensor:
    """Order by which each layer evicts, [L]: the leader's as far as the balance reaches."""
    balance, leader, turn = tables.standing.unbind()
    deviation = (lru_LE & (tables.slot_of_LE == NOWHERE)).sum()
    turn_L = (torch.arange(tables.num_layers, device=lru_LE.device) + turn) % tables.num_layers
    is_free_L = DEVIATION_PRICE * (1 + turn_L + deviation) <= balance
    return torch.where(is_free_L, leader, AS_LRU)


def learn(tables: AdaptiveTables) -> None:
    """Do what ``learn_torch`` does, in two launches: one program a layer, then one for all."""
    layers, experts = tables.num_layers, tables.num_experts
    assert experts <= MAX_EXPERTS, f"{experts} experts, at most {MAX_EXPERTS}"
    padded = max(32, triton.next_power_of_2(experts))
    learn_layers_kernel[(layers,)](
        tables.slot_of_LE, tables.slots_L, tables.use_LE, tables.rank_LRE, tables.average_LFE,
        tables.held_LE, tables.figures_LN, tables.weight_FR, tables.fade_F, tables.gain_F,
        E=experts, E2=padded, num_warps=4 if padded <= 256 else 8,
    )  # fmt: skip
    choose_kernel[(1,)](
        tables.figures_LN, tables.votes_M, tables.standing, tables.row_L, layers, num_warps=1
    )
