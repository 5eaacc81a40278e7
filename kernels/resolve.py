"""Which active expert sits where: hits, victims, loads and streams of one MoE layer.

Legend: T tokens, K choices a token, E local experts, S slots, R rows of one staging block,
A arrivals: the experts at hand, then the parts in which the loads are moved.
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag

import torch
import triton
from torch import Tensor

from vllm_moe_offload.kernels._resolve_triton import resolve_kernel, wave_map_kernel
from vllm_moe_offload.kernels.candidates import AS_LRU, FIRST, LOWER_FIRST, LRU
from vllm_moe_offload.kernels.dispatch import RANK_CHUNK, Dispatch, dispatch_torch
from vllm_moe_offload.kernels.dispatch import dispatch as sort_pairs

NOWHERE = -1
"""Marks an expert without a slot, a slot without an expert, and an inactive routed id."""

CLOSED = -2
"""Marks a slot whose memory serves another purpose now: it holds no expert and takes none."""

NEVER = -1
"""Stamp of a slot that was never read: older than every step."""

FOREVER = (1 << 63) - 1
"""Stamp of a closed slot: newer than every step, so that it is nobody's victim."""

MAX_SLOTS = 1024
MAX_EXPERTS = 1024
"""What one program can sort and count in registers."""

FUSED_PAIRS = 1024
"""Up to here resolve's one program also sorts the pairs; above, many programs do it sooner."""

COUNT_CHUNK = 2048
"""Routed ids counted at once; more would spill registers, fewer would wait longer for memory."""


class Counter(IntEnum):
    """Positions in ``WorkList.counters``, all in units of experts."""

    ACTIVE = 0
    HITS = 1
    LOADS = 2
    STREAMS = 3
    SURPLUS = 4
    """Moved by a sweep though nobody asked for them; resolve leaves it and those below alone."""
    PREFETCHED = 5
    """Brought into a slot ahead of the step."""
    PREFETCH_HITS = 6
    """Those of them that the step then read."""
    GUESSED = 7
    """Predicted for steps that had a prediction."""
    FOUND = 8
    """Those of them that the step then read."""
    FORESEEABLE = 9
    """Active experts of steps that had a prediction."""


class Use(IntFlag):
    """What resolve notes about an expert, see ``EvictionOrder``."""

    ACTIVE = 1
    """The step reads it."""
    RESIDENT = 2
    """It had a slot before the step."""


@dataclass(frozen=True)
class EvictionOrder:
    """One layer's share of the tables of a policy other than LRU.

    The resident of the lowest rank goes first: ``rank_RE`` (int32, from 0 up, no two of a row the
    same) holds several orders, of which row ``row`` (int32, one element) counts. Resolve only
    reads them. It writes ``use_E`` (int8, ``Use``) in steps that may evict. ``slot_of_E`` (int32)
    is the layer's table of slots, kept with the policy so that it sees all layers at once.
    """

    rank_RE: Tensor
    row: Tensor
    use_E: Tensor
    slot_of_E: Tensor


@dataclass(frozen=True)
class ResidencyTables:
    """Device tables of one layer's slots, updated in place by resolve.

    ``slot_of_E`` and ``expert_of_S`` (int32) are inverse to each other. ``stamp_S`` (int64)
    holds the clock value at which a slot was last read, ``clock`` (int64, one element) counts
    the layer's steps; 64 bits outlast any server. Without an ``order`` the least recently used
    resident goes first.
    """

    slot_of_E: Tensor
    expert_of_S: Tensor
    stamp_S: Tensor
    clock: Tensor
    order: EvictionOrder | None = None

    @classmethod
    def empty(
        cls,
        num_experts: int,
        num_slots: int,
        device: torch.device,
        order: EvictionOrder | None = None,
    ) -> "ResidencyTables":
        """Tables of a layer in which no expert is resident."""
        if order is None:
            slot_of_E = torch.full((num_experts,), NOWHERE, dtype=torch.int32, device=device)
        else:
            slot_of_E = order.slot_of_E.fill_(NOWHERE)
        return cls(
            slot_of_E=slot_of_E,
            expert_of_S=torch.full((num_slots,), NOWHERE, dtype=torch.int32, device=device),
            stamp_S=torch.full((num_slots,), NEVER, dtype=torch.int64, device=device),
            clock=torch.zeros(1, dtype=torch.int64, device=device),
            order=order,
        )


@dataclass(frozen=True)
class WorkList:
    """What a step has to move, in fixed-size lists with their lengths on the device.

    The first ``num_loads`` entries of ``load_expert_E`` go to the slots ``load_slot_E``. The
    first ``num_streams`` entries of ``stream_expert_E`` got no slot and pass through staging.
    Both lists are in ascending order of the expert id. ``counters`` (int64, indexed by
    ``Counter``) accumulates over steps. Entries past a length are undefined.
    """

    load_expert_E: Tensor
    load_slot_E: Tensor
    num_loads: Tensor
    stream_expert_E: Tensor
    num_streams: Tensor
    counters: Tensor

    @classmethod
    def empty(cls, num_experts: int, device: torch.device) -> "WorkList":
        """Lists for up to ``num_experts`` experts, with all counters at zero."""

        def int32(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=device)

        return cls(
            load_expert_E=int32(num_experts),
            load_slot_E=int32(num_experts),
            num_loads=int32(1),
            stream_expert_E=int32(num_experts),
            num_streams=int32(1),
            counters=torch.zeros(len(Counter), dtype=torch.int64, device=device),
        )


@dataclass(frozen=True)
class IdLog:
    """Where a step leaves the ids that its layer's router chose, for a recorder to read later.

    ``chosen_TK`` are the router's ids, which on a worker that holds some of the experts are not
    the local ones. ``log_TK`` (int16) has a fixed address and room for the largest step; a row
    beyond its end is not kept.
    """

    chosen_TK: Tensor
    log_TK: Tensor

    @property
    def num_pairs(self) -> int:
        """How many ids are kept."""
        return min(self.chosen_TK.numel(), self.log_TK.numel())


@dataclass(frozen=True)
class Padding:
    """Rows of a step that are padding, and the routed ids without theirs.

    ``is_padding_T`` (bool) says which rows choose nothing, whatever their ids are. ``active_TK``
    is overwritten with the ids that count, of the ids' type: -1 in rows of padding.
    """

    is_padding_T: Tensor
    active_TK: Tensor


def leave_out_padding_torch(ids_TK: Tensor, padding: Padding) -> Tensor:
    """Write the ids that count, and return them."""
    masked_TK = ids_TK.masked_fill(padding.is_padding_T.unsqueeze(1), NOWHERE)
    return padding.active_TK.copy_(masked_TK)


def log_torch(log: IdLog) -> None:
    """Leave the ids in the first rows of the log."""
    kept = log.log_TK.view(-1)[: log.num_pairs]
    kept.copy_(log.chosen_TK.reshape(-1)[: log.num_pairs])


def resolve_torch(
    ids_TK: Tensor,
    tables: ResidencyTables,
    work: WorkList,
    *,
    evict: bool,
    dispatch: Dispatch | None = None,
    log: IdLog | None = None,
    slot_of_AE: Tensor | None = None,
    padding: Padding | None = None,
) -> None:
    """Find the active experts' slots, give the missing ones new slots, list what to move.

    A resident active expert is a hit and its slot is stamped with the clock. Missing experts, in
    ascending order, take the slots that this step does not read: empty ones first, then by the
    policy's order if the tables have one, else the oldest stamp first and the lower expert first
    among equals, so that who stays does not depend on where it sits. If there are more of them than
    such slots, those of the highest ``entry_rank`` get one, without an order the first ones; the
    others are listed as streams. With ``evict`` false only empty slots are given away, so that a
    sweep over many tokens leaves the residents alone, and the policy is told nothing.

    Args:
        ids_TK: routed local expert ids, any integer type; negative ids are inactive and cost
            nothing.
        tables: updated in place; the clock advances by one.
        work: overwritten in place; its counters are added to.
        evict: whether a resident that this step does not read may lose its slot.
        dispatch: if given, the pairs are also sorted by expert into it, see ``dispatch``.
        log: if given, the router's ids are also kept there.
        slot_of_AE: if given, int32 [1 + parts, E]: row 0 is overwritten with the slots of the hits,
            row p with those of part p - 1 of the loads, see ``gather``; -1 for all others.
        padding: if given, its rows are inactive too, and the ids that count are written there.
    """
    if padding is not None:
        ids_TK = leave_out_padding_torch(ids_TK, padding)
    ids = ids_TK.reshape(-1)
    active_E = torch.zeros_like(tables.slot_of_E, dtype=torch.bool)
    active_E[ids[ids >= 0].long()] = True
    hit_E = active_E & (tables.slot_of_E >= 0)
    tables.stamp_S[tables.slot_of_E[hit_E].long()] = tables.clock
    if tables.order is not None and evict:
        resident_E = tables.slot_of_E >= 0
        tables.order.use_E.copy_(Use.ACTIVE * active_E + Use.RESIDENT * resident_E)

    missing = torch.nonzero(active_E & ~hit_E).flatten()
    slots = replaceable_slots(tables, evict=evict)
    num_loads = min(missing.numel(), slots.numel())
    loads, streams = _most_wanted(missing, num_loads, tables.order if evict else None)
    assign(tables, loads, slots[:num_loads])

    write_entries(work.load_expert_E, work.num_loads, loads)
    write_entries(work.load_slot_E, work.num_loads, slots[:num_loads])
    write_entries(work.stream_expert_E, work.num_streams, streams)
    if slot_of_AE is not None:
        _write_arrivals(slot_of_AE, tables, torch.nonzero(hit_E).flatten(), loads)
    work.counters[Counter.ACTIVE] += active_E.sum()
    work.counters[Counter.HITS] += hit_E.sum()
    work.counters[Counter.LOADS] += num_loads
    work.counters[Counter.STREAMS] += missing.numel() - num_loads
    tables.clock.add_(1)
    if dispatch is not None:
        dispatch_torch(ids_TK, dispatch)
    if log is not None:
        log_torch(log)


def entry_rank(rank_RE: Tensor) -> Tensor:
    """Rank the experts of one layer as those of which some get a slot, the highest first.

    Mostly as ``rank_RE`` does. Recency tells nothing about experts that are used all at once: the
    orders by recency let in the lower ids, as LRU does without an order, the last of them first
    what LRU's cache holds.
    """
    expert_E = torch.arange(rank_RE.shape[-1], dtype=rank_RE.dtype, device=rank_RE.device)
    by_id_RE = (rank_RE & FIRST) | (expert_E ^ LOWER_FIRST)
    row_R = torch.arange(rank_RE.shape[-2], device=rank_RE.device)
    is_by_id_R = (row_R == LRU) | (row_R == AS_LRU)
    return torch.where(is_by_id_R[:, None], by_id_RE, rank_RE)


def _most_wanted(missing: Tensor, count: int, order: EvictionOrder | None) -> tuple[Tensor, Tensor]:
    """Part the missing experts into those that get a slot and the others, both ascending."""
    if order is None or count == missing.numel():
        return missing[:count], missing[count:]
    rank_RE = entry_rank(order.rank_RE)
    by_rank = torch.argsort(rank_RE[order.row.long()].flatten()[missing], descending=True)
    return missing[by_rank[:count].sort().values], missing[by_rank[count:].sort().values]


def _write_arrivals(
    slot_of_AE: Tensor, tables: ResidencyTables, hits: Tensor, loads: Tensor
) -> None:
    parts = slot_of_AE.shape[0] - 1
    slot_of_AE.fill_(NOWHERE)
    slot_of_AE[0, hits] = tables.slot_of_E[hits]
    for part in range(parts):
        first, stop = (loads.numel() * n // parts for n in (part, part + 1))
        slot_of_AE[part + 1, loads[first:stop]] = tables.slot_of_E[loads[first:stop]]


def replaceable_slots(tables: ResidencyTables, *, evict: bool) -> Tensor:
    """Slots that may be overwritten in this step, best victim first."""
    is_empty = tables.expert_of_S == NOWHERE
    if tables.order is None:
        age = tables.stamp_S
    else:
        rank_E = tables.order.rank_RE[tables.order.row.long()].flatten()
        age = torch.where(is_empty, NOWHERE, rank_E[tables.expert_of_S.clamp(min=0).long()])
    by_expert = torch.argsort(tables.expert_of_S, stable=True)
    by_age = by_expert[torch.argsort(age[by_expert], stable=True)]
    free = tables.stamp_S < tables.clock if evict else is_empty
    return by_age[free[by_age]]


def assign(tables: ResidencyTables, experts: Tensor, slots: Tensor) -> None:
    """Give slots to experts that have none, as if they had been read now."""
    evicted = tables.expert_of_S[slots]
    tables.slot_of_E[evicted[evicted >= 0].long()] = NOWHERE
    tables.slot_of_E[experts] = slots.int()
    tables.expert_of_S[slots] = experts.int()
    tables.stamp_S[slots] = tables.clock


def write_entries(entries: Tensor, length: Tensor, values: Tensor) -> None:
    """Write a list of a work list and its length."""
    entries[: values.numel()] = values.int()
    length.fill_(values.numel())


def resolve(
    ids_TK: Tensor,
    tables: ResidencyTables,
    work: WorkList,
    *,
    evict: bool,
    dispatch: Dispatch | None = None,
    log: IdLog | None = None,
    slot_of_AE: Tensor | None = None,
    padding: Padding | None = None,
) -> None:
    """Do what ``resolve_torch`` does, in one launch of one program that the host never waits for.

    More than ``FUSED_PAIRS`` pairs are sorted by further launches.
    """
    num_pairs = ids_TK.numel()
    num_experts, num_slots = tables.slot_of_E.numel(), tables.expert_of_S.numel()
    assert num_experts <= MAX_EXPERTS, f"{num_experts} experts, at most {MAX_EXPERTS}"
    assert num_slots <= MAX_SLOTS, f"{num_slots} slots, at most {MAX_SLOTS}"
    sizes = resolve_sizes(num_pairs, num_experts, num_slots)
    fused = dispatch if sizes.is_fused else None
    order = tables.order if evict else None
    resolve_kernel[(1,)](
        ids_TK.reshape(-1), num_pairs,
        tables.slot_of_E, tables.expert_of_S, tables.stamp_S, tables.clock, num_slots,
        work.load_expert_E, work.load_slot_E, work.num_loads,
        work.stream_expert_E, work.num_streams, work.counters,
        order and order.rank_RE, order and order.rank_RE.stride(0), order and order.row,
        order and order.use_E,
        fused and fused.sorted_pair, fused and fused.expert_of_block, fused and fused.num_blocks,
        log and log.chosen_TK.reshape(-1), log and log.log_TK, log.num_pairs if log else 0,
        slot_of_AE,
        padding and padding.is_padding_T, padding and padding.active_TK.view(-1),
        E=num_experts, E2=max(32, triton.next_power_of_2(num_experts)),
        S2=max(16, triton.next_power_of_2(num_slots)), EVICT=evict,
        COUNT_CHUNK=sizes.count_chunk, RANK_CHUNK=sizes.rank_chunk,
        BLOCK_M=fused.block_m if fused else 1,
        PARTS=0 if slot_of_AE is None else slot_of_AE.shape[0] - 1,
        CHOICES=ids_TK.shape[1],
        num_warps=sizes.num_warps,
    )  # fmt: skip
    if dispatch is not None and fused is None:
        sort_pairs(ids_TK if padding is None else padding.active_TK, dispatch)


@dataclass(frozen=True)
class ResolveSizes:
    """What resolve's launch is built for, of all that depends on a step's pairs."""

    is_fused: bool
    """Whether its program also sorts the pairs."""
    count_chunk: int
    rank_chunk: int
    num_warps: int


def resolve_sizes(num_pairs: int, num_experts: int, num_slots: int) -> ResolveSizes:
    """Sizes for a step of so many pairs, active or not."""
    padded = triton.next_power_of_2(num_pairs)
    return ResolveSizes(
        is_fused=num_pairs <= FUSED_PAIRS,
        count_chunk=min(COUNT_CHUNK, max(128, padded)),
        rank_chunk=min(RANK_CHUNK, max(16, padded)),
        # Few warps wait less for each other, many sort and count more at once.
        num_warps=4 if max(num_pairs, num_experts, num_slots) <= 256 else 8,
    )


def wave_map_torch(work: WorkList, first: int, row_of_E: Tensor, *, rows: int) -> None:
    """Map the streams ``first .. first + rows`` to staging rows ``0 .. rows``.

    Args:
        work: the step's work list.
        first: position in the list of streams of the wave's first expert.
        row_of_E: int32 [E], overwritten: staging row of each expert of the wave, else -1.
        rows: rows of the staging block.
    """
    row_of_E.fill_(NOWHERE)
    position_E = torch.arange(row_of_E.numel(), device=row_of_E.device)
    in_wave_E = (
        (position_E >= first) & (position_E < first + rows) & (position_E < work.num_streams)
    )
    row_of_E[work.stream_expert_E[in_wave_E].long()] = (position_E[in_wave_E] - first).int()


def wave_map(work: WorkList, first: int, row_of_E: Tensor, *, rows: int) -> None:
    """Do what ``wave_map_torch`` does, in one launch."""
    num_experts = row_of_E.numel()
    wave_map_kernel[(1,)](
        work.stream_expert_E, work.num_streams, first, rows, row_of_E,
        E=num_experts, E2=triton.next_power_of_2(num_experts),
    )  # fmt: skip
