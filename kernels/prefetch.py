"""Fetch ahead: judge the last guess, predict the next layer's experts, find slots for them.

Legend: T tokens, K choices a token, L layers, E experts of a layer, M tokens of the largest step
that is predicted.
"""

from dataclasses import dataclass
from enum import IntFlag

import torch
import triton
from torch import Tensor

from vllm_moe_offload.kernels._prefetch_triton import look_ahead_kernel
from vllm_moe_offload.kernels.fixed_point import LEAST_DEMAND, MOST_DEMAND
from vllm_moe_offload.kernels.predict import Source, arguments, demand, demand_torch, num_warps
from vllm_moe_offload.kernels.resolve import (
    NEVER,
    Counter,
    ResidencyTables,
    WorkList,
    assign,
    replaceable_slots,
    write_entries,
)

OFF = -1
"""Instead of a number of rows: predict nothing."""

FUSED_TOKENS = 4
"""Up to here one program adds up the demand of all tokens; above, a launch of many does."""


class Ahead(IntFlag):
    """What was done ahead for an expert."""

    GUESSED = 1
    FETCHED = 2


def adds_up_itself(num_tokens: int) -> bool:
    """Whether the one program of ``look_ahead`` adds up the demand of so many tokens."""
    return num_tokens <= FUSED_TOKENS


@dataclass(frozen=True)
class LayerAhead:
    """One layer as the layer before it sees it: its tables, lists and marks.

    ``ahead_E`` (int8, ``Ahead``) holds what was done for the step that the layer has next.
    """

    tables: ResidencyTables
    work: WorkList
    ahead_E: Tensor


@dataclass(frozen=True)
class Outlook:
    """What all layers share.

    ``rows`` (int32 [1]) is how many experts a layer may be fetched, or ``OFF``. ``ids_LTK`` (int32
    [L, M, K]) keeps the routed ids of the step to learn from. ``demand_E`` (int32) is scratch that
    is zero between launches.
    """

    rows: Tensor
    ids_LTK: Tensor
    demand_E: Tensor


def look_ahead_torch(
    ids_TK: Tensor, layer: int, own: LayerAhead, following: LayerAhead | None,
    source: Source | None, outlook: Outlook,
) -> None:  # fmt: skip
    """Judge what was done ahead for this layer, and do the same for the layer after it.

    Runs when this layer has been resolved and the layer after it has not. What was fetched for this
    layer and not read gets the stamp of the oldest resident, so that it goes first under LRU; the
    order of another policy takes no notice of stamps. Then the experts of the following layer are
    ordered by expected demand, the lower expert first among equals. As many of them as this layer
    reads are its guess. Those of the guess that have no slot and a demand of ``LEAST_DEMAND`` get
    one, up to the number of rows; they take empty slots and those of residents that are not
    guessed, in the order in which resolve would, so none of more demand goes. Their slots are
    stamped as if read in the layer's last step, so the coming one evicts none that it reads. The
    loads are listed in the following layer's work list until its own resolve overwrites it: they
    must have been made by then.

    Args:
        ids_TK: routed local expert ids of this layer; negative ones are inactive.
        layer: this layer's number.
        own: this layer.
        following: the next one; None for the last.
        source: the predictor's tables; None with ``following``.
        outlook: what all layers share; this layer's ids are kept in it.
    """
    ids_LTK = outlook.ids_LTK
    ids_LTK[layer, : ids_TK.shape[0]] = ids_TK
    if int(outlook.rows) == OFF:
        if following is not None:
            following.work.num_loads.zero_()
        return
    active_E = torch.zeros_like(own.ahead_E, dtype=torch.bool)
    active_E[ids_TK[ids_TK >= 0].long()] = True
    _judge(active_E, own)
    if following is None or source is None:
        return
    demand_E = demand_torch(ids_TK, source, layer).clamp(max=MOST_DEMAND)
    order_E = torch.argsort(demand_E, descending=True, stable=True)
    guess = order_E[: int(active_E.sum())]
    guess = guess[demand_E[guess] > 0]
    following.ahead_E[guess] = Ahead.GUESSED
    _fetch(guess, demand_E, following, int(outlook.rows))


def _judge(active_E: Tensor, own: LayerAhead) -> None:
    """Count what came true, and stamp what was fetched in vain so that it goes first under LRU."""
    guessed_E = (own.ahead_E & Ahead.GUESSED) != 0
    fetched_E = (own.ahead_E & Ahead.FETCHED) != 0
    counters = own.work.counters
    if bool(guessed_E.any()):
        counters[Counter.GUESSED] += guessed_E.sum()
        counters[Counter.FOUND] += (guessed_E & active_E).sum()
        counters[Counter.FORESEEABLE] += active_E.sum()
    counters[Counter.PREFETCH_HITS] += (fetched_E & active_E).sum()
    wasted = own.tables.slot_of_E[fetched_E & ~active_E]
    own.tables.stamp_S[wasted[wasted >= 0].long()] = NEVER
    own.ahead_E.zero_()


def _fetch(guess: Tensor, demand_E: Tensor, following: LayerAhead, rows: int) -> None:
    tables, work = following.tables, following.work
    absent = guess[(tables.slot_of_E[guess] < 0) & (demand_E[guess] >= LEAST_DEMAND)]
    guessed_E = torch.zeros_like(following.ahead_E, dtype=torch.bool)
    guessed_E[guess] = True
    slots = replaceable_slots(tables, evict=True)
    expert_of = tables.expert_of_S[slots].long()
    slots = slots[(expert_of < 0) | ~guessed_E[expert_of.clamp(min=0)]]
    count = min(rows, absent.numel(), slots.numel())
    assign(tables, absent[:count], slots[:count])
    tables.stamp_S[slots[:count]] = tables.clock - 1
    write_entries(work.load_expert_E, work.num_loads, absent[:count])
    write_entries(work.load_slot_E, work.num_loads, slots[:count])
    following.ahead_E[absent[:count]] = Ahead.GUESSED | Ahead.FETCHED
    work.counters[Counter.PREFETCHED] += count


def look_ahead(
    ids_TK: Tensor, layer: int, own: LayerAhead, following: LayerAhead | None,
    source: Source | None, outlook: Outlook,
) -> None:  # fmt: skip
    """Do what ``look_ahead_torch`` does, in one launch, or two for more than a few tokens."""
    ids_TK = ids_TK.contiguous()
    tokens, top_k = ids_TK.shape
    experts = outlook.demand_E.numel()
    tables: list[Tensor | None] = [None] * 4
    sizes = {"E": experts, "E2": max(32, triton.next_power_of_2(experts)), "N": 1, "FIRST": False,
             "KIND": "none"}  # fmt: skip
    warps, is_fused = 4, adds_up_itself(tokens)
    if source is not None:
        tables, sizes = arguments(source, layer, experts)
        warps = num_warps(source, experts)
        if not is_fused:
            demand(ids_TK, source, layer, outlook.demand_E, outlook.rows)
    other = following or own
    order = other.tables.order
    num_slots = other.tables.expert_of_S.numel()
    look_ahead_kernel[(1,)](
        ids_TK, tokens, outlook.ids_LTK[layer], outlook.rows, outlook.demand_E,
        own.ahead_E, own.tables.slot_of_E, own.tables.stamp_S, own.work.counters,
        other.ahead_E, other.tables.slot_of_E, other.tables.expert_of_S, other.tables.stamp_S,
        other.tables.clock, num_slots, other.work.load_expert_E, other.work.load_slot_E,
        other.work.num_loads, other.work.counters,
        order and order.rank_RE, order and order.rank_RE.stride(0), order and order.row, *tables,
        K=top_k, S2=max(16, triton.next_power_of_2(num_slots)), FUSED=is_fused,
        HAS_NEXT=following is not None, num_warps=warps, **sizes,
    )  # fmt: skip
