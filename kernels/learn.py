"""What a step teaches about eviction: the adaptive policy, for all layers at once.

It follows the best of several orders of the experts, as far as LRU cannot be lost to.

Candidates are LRU, mixtures of three exponential averages of an expert's use (LRFU, Lee et al.,
IEEE Transactions on Computers 50(12), 2001, whose one time constant here becomes several), and the
sequel: for each pair of a layer's experts a table knows how often one was used a few steps after
the other, and the experts of this step are asked who comes after them, as a Markov prefetcher asks
what follows a miss (Joseph and Grunwald, ISCA 1997).

Every candidate has a cache of its own, as a set of experts, which evicts by its order alone. Each
step votes with the hits of these caches. The candidate with the most faded votes leads, as the
cheaper expert does in LeCaR (Vietri et al., HotStorage 2018), but all layers vote together, so that
a few dozen tokens decide. Whole caches by name make the ghost lists of ARC (Megiddo and Modha, FAST
2003) needless.

Votes can be wrong, so the real cache is kept near LRU's. The balance counts the real hits above
those of LRU, plus ``LOSS_RATE`` an access; the deviation counts the experts that LRU holds and the
cache does not, each of which can cost one hit before both agree again. Layers evict by the leader's
order, in turn, only as far as the balance covers the price of the deviation, and else let go what
LRU does not hold, oldest first, which never adds to the deviation. So a wrong leader costs about
``LOSS_RATE`` of the accesses, and gains pay for more freedom. The balance has a ceiling, so that no
gain of yesterday pays for long losses of today.

A step of many sequences may miss more experts than the slots that it can give away. By the leader's
order they compete for those, by LRU's the lower ids get them. Such a step can make the cache differ
from LRU's in all of these slots at once, and the price counts them.

Legend: L layers, E experts (the most of any layer), R orders of a layer (the candidates, and last
the one that follows LRU's cache), M candidates, F averages of a use, S slots, N figures of a layer,
A the (layer, expert) pairs that something holds for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
from torch import Tensor

from vllm_moe_offload.kernels._learn_triton import (
    choose_kernel,
    learn_layers_kernel,
    learn_sequels_kernel,
)
from vllm_moe_offload.kernels.candidates import (
    AS_LRU,
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
from vllm_moe_offload.kernels.resolve import (
    MAX_EXPERTS,
    NOWHERE,
    EvictionOrder,
    Use,
    entry_rank,
)

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
    ``row_L``. ``slots_L`` (int32) are the slots that are open.

    ``average_LFE`` (float32) holds the averages of an expert's use, faded for the next step.
    ``history_LE`` (int8) has bit ``n`` set where an expert was used ``n`` steps ago, and
    ``sequel_LEE`` (int16) tells for each expert how often each other one was used soon after it.
    ``held_LE`` (int32) has bit ``m`` set where candidate ``m``'s cache holds an expert. ``votes_M``
    (float32) are faded for the next step. ``standing`` (int64) is indexed by ``Standing``.
    ``expected_LE`` (int32, 0 between steps) and ``figures_LN`` are scratch between the launches;
    ``weight_FR``, ``fade_F`` and ``gain_F`` (float32) are constants.
    """

    slot_of_LE: Tensor
    slots_L: Tensor
    use_LE: Tensor
    rank_LRE: Tensor
    row_L: Tensor
    average_LFE: Tensor
    history_LE: Tensor
    sequel_LEE: Tensor
    held_LE: Tensor
    votes_M: Tensor
    standing: Tensor
    expected_LE: Tensor
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

        # The orders by recency weigh nothing.
        nothing = (0,) * len(FADES)
        weights_RF = [nothing, *MIXTURES, SEQUEL_MIXTURE, nothing]
        tables = cls(
            slot_of_LE=full((layers, experts), NOWHERE, torch.int32),
            slots_L=torch.tensor(num_slots, dtype=torch.int32, device=device),
            use_LE=full((layers, experts), 0, torch.int8),
            rank_LRE=full((layers, ORDERS, experts), 0, torch.int32),
            row_L=full((layers,), 0, torch.int32),
            average_LFE=full((layers, len(FADES), experts), 0, torch.float32),
            history_LE=full((layers, experts), 0, torch.int8),
            sequel_LEE=full((layers, experts, experts), 0, torch.int16),
            held_LE=full((layers, experts), 0, torch.int32),
            votes_M=full((CANDIDATES,), 0, torch.float32),
            standing=full((len(Standing),), 0, torch.int64),
            expected_LE=full((layers, experts), 0, torch.int32),
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
        for table in (self.use_LE, self.average_LFE, self.history_LE, self.sequel_LEE,
                      self.held_LE, self.votes_M, self.standing):  # fmt: skip
            table.zero_()
        self.rank_LRE.copy_(torch.arange(self.num_experts, device=self.rank_LRE.device))
        self.row_L.fill_(AS_LRU)
        self.standing[Standing.LEADER] = OPENING_LEADER
        self.standing[Standing.BALANCE] = OPENING_CREDIT * self.num_layers

    def order(self, layer: int, num_experts: int) -> EvictionOrder:
        """What resolve needs of one layer, as views."""
        return EvictionOrder(
            slot_of_E=self.slot_of_LE[layer, :num_experts],
            use_E=self.use_LE[layer, :num_experts],
            rank_RE=self.rank_LRE[layer, :, :num_experts],
            row=self.row_L[layer : layer + 1],
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
    held_LME = _adopted(tables, cached_LE, reads_L1)

    if bool(reads_L1.any()):
        hits_M = (held_LME & active_LE[:, None]).sum((0, 2))
        votes_M = tables.votes_M + hits_M
        lead = (active_LE & cached_LE).sum() - hits_M[LRU]
        most = HIT * (tables.slots_L.sum() + tables.num_layers)
        gained = HIT * lead + LOSS_RATE * active_LE.sum()
        balance, leader, turn = tables.standing.unbind()
        balance.copy_(torch.minimum(balance + gained, most))
        leader.copy_(_leader(votes_M, leader, tables.num_layers))
        turn.copy_((turn + STRIDE) % tables.num_layers)
        tables.votes_M.copy_(votes_M * VOTE_FADE)

    held_LME = _admitted(tables, held_LME, active_LE)
    expected_LE = _note_sequels(tables, active_LE, reads_L1)
    _take_in(tables, active_LE, held_LME, expected_LE, reads_L1)
    contested = _contested(active_LE, cached_LE, tables.slots_L)
    tables.row_L.copy_(_rows(tables, held_LME[:, LRU], contested))
    tables.use_LE.zero_()


def _adopted(tables: AdaptiveTables, cached_LE: Tensor, reads_L1: Tensor) -> Tensor:
    """The candidates' caches before the step, [L, M, E].

    As long as a cache has empty slots it has evicted nobody, and neither has the real one, so both
    hold the same; a sweep may have added to the real one. And slots that open or close would do
    so under every candidate. So it is the real one unless both are exactly full.
    """
    bit_M1 = torch.arange(CANDIDATES, device=cached_LE.device)[:, None]
    held_LME = ((tables.held_LE[:, None] >> bit_M1) & 1) > 0
    cached_L1E, slots_L11 = cached_LE[:, None], tables.slots_L[:, None, None]
    full_LM1 = (held_LME.sum(2, keepdim=True) == slots_L11) & (
        cached_L1E.sum(2, keepdim=True) == slots_L11
    )
    return torch.where(full_LM1 | ~reads_L1[:, None], held_LME, cached_L1E)


def _leader(votes_M: Tensor, leader: Tensor, num_layers: int) -> Tensor:
    """Return the candidate to follow; the first of equals, and only if it is well ahead."""
    best = torch.nonzero(votes_M == votes_M.max())[0, 0]
    return torch.where(votes_M[best] - votes_M[leader] > SWITCH_MARGIN * num_layers, best, leader)


def _admitted(tables: AdaptiveTables, held_LME: Tensor, active_LE: Tensor) -> Tensor:
    """The candidates' caches after the step, [L, M, E], by the rules of resolve."""
    active_L1E = active_LE[:, None]
    missing_LME, evictable_LME = active_L1E & ~held_LME, held_LME & ~active_L1E
    room_LM = tables.slots_L[:, None] - held_LME.sum(2)
    most_LM = evictable_LME.sum(2)
    victims_LM = (missing_LME.sum(2) - room_LM).clamp(min=0).minimum(most_LM)
    rank_LME = tables.rank_LRE[:, :AS_LRU]
    leaving_LME = _position(torch.where(evictable_LME, rank_LME, 2 * FIRST - 1))
    evicted_LME = evictable_LME & (leaving_LME < victims_LM[..., None])
    entry_LME = entry_rank(tables.rank_LRE)[:, :AS_LRU]
    coming_LME = _position(torch.where(missing_LME, -entry_LME, 1))
    gets_slot_LME = missing_LME & (coming_LME < (room_LM + victims_LM)[..., None])
    return (held_LME & ~evicted_LME) | gets_slot_LME


def _position(key: Tensor) -> Tensor:
    """Position of each entry among its row's in ascending order; there must be no equals."""
    return key.argsort(-1).argsort(-1)


def _note_sequels(tables: AdaptiveTables, active_LE: Tensor, reads_L1: Tensor) -> Tensor:
    """Note who was used soon after whom; returns how much the step's experts expect of each."""
    history_LE = ((tables.history_LE.int() << 1) | active_LE) & ((1 << (SOON[-1] + 1)) - 1)
    uses_LE = torch.stack([(history_LE >> n) & 1 for n in range(len(SOON))]).sum(0)
    layer_A, expert_A = torch.nonzero((history_LE >> SOON[-1] > 0) & reads_L1, as_tuple=True)
    sequel_AE = tables.sequel_LEE[layer_A, expert_A].int()
    sequel_AE += (SEQUEL_UNIT * uses_LE[layer_A] - sequel_AE) >> SEQUEL_SHIFT
    tables.sequel_LEE[layer_A, expert_A] = sequel_AE.short()
    tables.history_LE.copy_(torch.where(reads_L1, history_LE, tables.history_LE))
    layer_A, expert_A = torch.nonzero(active_LE, as_tuple=True)
    asked_AE = tables.sequel_LEE[layer_A, expert_A].int()
    return torch.zeros_like(tables.expected_LE).index_add_(0, layer_A, asked_AE)


def _take_in(
    tables: AdaptiveTables,
    active_LE: Tensor,
    held_LME: Tensor,
    expected_LE: Tensor,
    reads_L1: Tensor,
) -> None:
    """Note the uses and whom each candidate holds, and rank the experts anew."""
    gain_F1, fade_F1 = tables.gain_F[:, None], tables.fade_F[:, None]
    average_LFE = tables.average_LFE + gain_F1 * active_LE[:, None]
    used_LE = average_LFE[:, 0] > 0
    faded_LFE = (average_LFE * fade_F1).clamp(min=FAINT) * used_LE[:, None]

    expert_E = torch.arange(tables.num_experts, dtype=torch.int32, device=active_LE.device)
    older_LE = torch.maximum(tables.rank_LRE[:, LRU] - (1 << EXPERT_BITS), expert_E)
    recency_LE = torch.where(active_LE, (MAX_AGE << EXPERT_BITS) | expert_E, older_LE)
    score_LRE = _mixed(tables, average_LFE)
    in_units_LE = (score_LRE[:, SEQUEL] * SEQUEL_UNIT).int()
    expected_LE = expected_LE + active_LE.sum(1, keepdim=True) * in_units_LE
    score_LRE[:, SEQUEL] = expected_LE.float() * SEQUEL_SCALE
    # The bits of floats from 0 up order as the floats do.
    rank_LRE = (score_LRE.view(torch.int32) & -(1 << EXPERT_BITS)) | expert_E
    rank_LRE[:, LRU] = recency_LE
    rank_LRE[:, AS_LRU] = recency_LE + FIRST * held_LME[:, LRU]

    bit_M1 = (1 << torch.arange(CANDIDATES, device=active_LE.device))[:, None]
    held_LE = (held_LME * bit_M1).sum(1)
    reads_L11 = reads_L1[:, None]
    tables.average_LFE.copy_(torch.where(reads_L11, faded_LFE, tables.average_LFE))
    tables.rank_LRE.copy_(torch.where(reads_L11, rank_LRE, tables.rank_LRE))
    tables.held_LE.copy_(torch.where(reads_L1, held_LE, tables.held_LE))


def _mixed(tables: AdaptiveTables, average_LFE: Tensor) -> Tensor:
    """The weighted averages, float32 [L, R, E]."""
    terms_FLRE = tables.weight_FR[:, None, :, None] * average_LFE.transpose(0, 1)[:, :, None]
    total_LRE = terms_FLRE[0]
    for term_LRE in terms_FLRE[1:]:
        total_LRE = total_LRE + term_LRE
    return total_LRE


def _contested(active_LE: Tensor, cached_LE: Tensor, slots_L: Tensor) -> Tensor:
    """Count the slots for which more experts were missing than could have one."""
    left_L = (slots_L - (active_LE & cached_LE).sum(1)).clamp(min=0)
    return left_L[active_LE.sum(1) > slots_L].sum()


def _rows(tables: AdaptiveTables, lru_LE: Tensor, contested: Tensor) -> Tensor:
    """Order by which each layer evicts, [L]: the leader's as far as the balance reaches."""
    balance, leader, turn = tables.standing.unbind()
    deviation = (lru_LE & (tables.slot_of_LE == NOWHERE)).sum()
    more = 1 + contested // tables.num_layers
    turn_L = (torch.arange(tables.num_layers, device=lru_LE.device) + turn) % tables.num_layers
    is_free_L = DEVIATION_PRICE * ((1 + turn_L) * more + deviation) <= balance
    return torch.where(is_free_L, leader, AS_LRU)


def learn(tables: AdaptiveTables) -> None:
    """Do what ``learn_torch`` does in three launches: tables of pairs, layers, all together."""
    layers, experts = tables.num_layers, tables.num_experts
    assert experts <= MAX_EXPERTS, f"{experts} experts, at most {MAX_EXPERTS}"
    padded = max(32, triton.next_power_of_2(experts))
    rows = 16 if padded <= 256 else 4
    learn_sequels_kernel[(layers, triton.cdiv(experts, rows))](
        tables.use_LE, tables.history_LE, tables.sequel_LEE, tables.expected_LE,
        E=experts, E2=padded, ROWS=rows, num_warps=4,
    )  # fmt: skip
    learn_layers_kernel[(layers,)](
        tables.slot_of_LE, tables.slots_L, tables.use_LE, tables.rank_LRE, tables.average_LFE,
        tables.history_LE, tables.expected_LE, tables.held_LE, tables.figures_LN,
        tables.weight_FR, tables.fade_F, tables.gain_F,
        E=experts, E2=padded, num_warps=4 if padded <= 256 else 8,
    )  # fmt: skip
    choose_kernel[(1,)](
        tables.figures_LN, tables.votes_M, tables.standing, tables.row_L, layers, num_warps=1
    )
