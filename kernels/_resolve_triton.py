# mypy: ignore-errors
"""Triton bodies of ``resolve`` and ``wave_map``: one program does a layer's whole bookkeeping.

Legend: E local experts, S slots; E2 and S2 are rounded up to powers of two. One program means
that no two threads meet in memory: what one thread computes another gets through registers
(``tl.gather``, ``tl.sort``), so the tables are read once at the start and written once at the end.
"""

import triton
import triton.language as tl

from vllm_moe_offload.kernels import candidates
from vllm_moe_offload.kernels._dispatch_triton import (
    count_experts,
    first_blocks,
    load_ids,
    place_pairs,
    write_blocks,
)

LRU, AS_LRU = tl.constexpr(candidates.LRU), tl.constexpr(candidates.AS_LRU)
FIRST = tl.constexpr(candidates.FIRST)
LOWER_FIRST = tl.constexpr(candidates.LOWER_FIRST)


@triton.jit
def leave_out_padding(ids, num_ids, is_padding, active, CHOICES: tl.constexpr, CHUNK: tl.constexpr):
    """Write the ids that count, -1 in rows of padding; every thread may read them afterwards."""
    for first in range(0, num_ids, CHUNK):
        pair = first + tl.arange(0, CHUNK)
        inside = pair < num_ids
        expert = tl.load(ids + pair, mask=inside, other=-1)
        is_out = tl.load(is_padding + pair // CHOICES, mask=inside, other=1).to(tl.int1)
        tl.store(active + pair, tl.where(is_out, -1, expert), mask=inside)
    tl.debug_barrier()


@triton.jit
def oldest_first(
    free_S, expert_S, stamp_S, rank, rank_stride, rank_row, E2: tl.constexpr, S2: tl.constexpr
):
    """Sort the free slots, the one to be given away first in front; ``rank`` is None for LRU."""
    # One key orders by age, then slot: the factors are powers of two, so the slot is its lowest
    # bits, below an age of -1 too.
    if rank is None:
        # By stamp, then expert: 42 bits are left for the stamp.
        age_S = stamp_S * (2 * E2) + (expert_S + 1)
    else:
        rank_of_S = rank + tl.load(rank_row) * rank_stride + expert_S
        age_S = tl.load(rank_of_S, mask=free_S & (expert_S >= 0), other=-1).to(tl.int64)
    key_S = tl.where(free_S, age_S * S2 + tl.arange(0, S2), 0x7FFFFFFFFFFFFFFF)
    return (tl.sort(key_S) & (S2 - 1)).to(tl.int32)


@triton.jit
def most_wanted(missing_E, num_loads, rank, rank_stride, rank_row, E2: tl.constexpr):
    """Choose who of the missing experts gets a slot, if not all do: see ``entry_rank``."""
    expert, row = tl.arange(0, E2), tl.load(rank_row)
    rank_E = tl.load(rank + row * rank_stride + expert, mask=missing_E, other=-1)
    by_id_E = (rank_E & FIRST) | (expert ^ LOWER_FIRST)
    is_by_id = (row == LRU) | (row == AS_LRU)
    key_E = tl.where(missing_E & is_by_id, by_id_E, rank_E)
    is_least_E = expert == E2 - num_loads
    least = tl.sum(tl.where(is_least_E, tl.sort(key_E), 0), 0)
    return missing_E & (key_E >= least) & (num_loads > 0)


@triton.jit
def replace(
    missing_E, num_missing, free_S, expert_S, stamp_S, now,
    slot_of_E, expert_of_S, stamp_of_S,
    load_expert, load_slot, stream_expert,
    rank, rank_stride, rank_row,
    E2: tl.constexpr, S2: tl.constexpr,
):  # fmt: skip
    """Give the missing experts the free slots, oldest first.

    Returns how many got one, which slot each got or -1, and each one's place among those.
    """
    expert = tl.arange(0, E2)
    num_loads = tl.minimum(num_missing, tl.sum(free_S.to(tl.int32), 0))
    victims = oldest_first(free_S, expert_S, stamp_S, rank, rank_stride, rank_row, E2, S2)

    place_E = tl.cumsum(missing_E.to(tl.int32), 0) - 1
    loaded_E = missing_E & (place_E < num_loads)
    stream_E = place_E - num_loads
    if rank is not None:  # noqa: SIM102 - known when it is compiled
        # Sorting is dear, and few sequences seldom miss more than there are slots to give.
        if num_missing > num_loads:
            loaded_E = most_wanted(missing_E, num_loads, rank, rank_stride, rank_row, E2)
            num_loaded_E = tl.cumsum(loaded_E.to(tl.int32), 0)
            stream_E = place_E - num_loaded_E
            place_E = num_loaded_E - 1
    victim_E = tl.gather(victims, tl.where(loaded_E, place_E, 0), 0)
    evicted_E = tl.gather(expert_S, victim_E, 0)
    # An evicted expert had a slot and a loaded one had none, so these two never collide.
    tl.store(slot_of_E + evicted_E, -1, mask=loaded_E & (evicted_E >= 0))
    tl.store(slot_of_E + expert, victim_E, mask=loaded_E)
    tl.store(expert_of_S + victim_E, expert, mask=loaded_E)
    tl.store(stamp_of_S + victim_E, tl.zeros_like(victim_E).to(tl.int64) + now, mask=loaded_E)
    tl.store(load_expert + place_E, expert, mask=loaded_E)
    tl.store(load_slot + place_E, victim_E, mask=loaded_E)
    tl.store(stream_expert + stream_E, expert, mask=missing_E & ~loaded_E)
    return num_loads, tl.where(loaded_E, victim_E, -1), place_E


@triton.jit
def write_arrivals(
    arrival, hit_E, slot_E, given_E, place_E, num_loads, E: tl.constexpr, PARTS: tl.constexpr
):
    """Write a row of slots for the experts at hand, and one for each part of the loads."""
    expert = tl.arange(0, hit_E.shape[0])
    tl.store(arrival + expert, tl.where(hit_E, slot_E, -1), mask=expert < E)
    for part in tl.static_range(PARTS):
        first, stop = num_loads * part // PARTS, num_loads * (part + 1) // PARTS
        in_part_E = (given_E >= 0) & (place_E >= first) & (place_E < stop)
        row = arrival + (part + 1) * E + expert
        tl.store(row, tl.where(in_part_E, given_E, -1), mask=expert < E)


# Where a layer's part of a table begins must not make builds of its own.
@triton.jit(
    do_not_specialize=["num_ids", "S", "num_logged"],
    do_not_specialize_on_alignment=["slot_of_E", "rank_row", "use", "log"],
)
def resolve_kernel(
    ids, num_ids,
    slot_of_E, expert_of_S, stamp_of_S, clock, S,
    load_expert, load_slot, num_loads_ptr, stream_expert, num_streams_ptr, counters,
    rank, rank_stride, rank_row, use,
    sorted_pair, expert_of_block, num_blocks,
    chosen, log, num_logged, arrival, is_padding, active,
    E: tl.constexpr, E2: tl.constexpr, S2: tl.constexpr, EVICT: tl.constexpr,
    COUNT_CHUNK: tl.constexpr, RANK_CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    """See ``resolve``.

    ``rank``, its stride and row, and ``use`` are None where LRU rules, ``sorted_pair``, ``log``,
    ``arrival`` and ``is_padding`` where that part is not wanted.
    """
    if is_padding is not None:
        leave_out_padding(ids, num_ids, is_padding, active, CHOICES, COUNT_CHUNK)
        ids = active
    expert, slot = tl.arange(0, E2), tl.arange(0, S2)
    slot_E = tl.load(slot_of_E + expert, mask=expert < E, other=-1)
    expert_S = tl.load(expert_of_S + slot, mask=slot < S, other=-1)
    stamp_S = tl.load(stamp_of_S + slot, mask=slot < S, other=0)
    now = tl.load(clock)
    counter = tl.arange(0, 4)
    totals = tl.load(counters + counter)

    count_E = tl.zeros([E2], tl.int32)
    # Counting has threads wait for each other, and without pairs no table changes: so every thread
    # has read the tables before any thread writes them.
    for first in range(0, num_ids, COUNT_CHUNK):
        pair = first + tl.arange(0, COUNT_CHUNK)
        count_E += count_experts(load_ids(ids, pair, num_ids, E), E2)

    active_E = count_E > 0
    hit_E = active_E & (slot_E >= 0)
    missing_E = active_E & (slot_E < 0)
    num_hits = tl.sum(hit_E.to(tl.int32), 0)
    num_missing = tl.sum(missing_E.to(tl.int32), 0)
    tl.store(stamp_of_S + slot_E, tl.zeros_like(slot_E).to(tl.int64) + now, mask=hit_E)
    if use is not None:
        # The bits of Use: active, resident.
        use_E = active_E.to(tl.int32) + 2 * (slot_E >= 0).to(tl.int32)
        tl.store(use + expert, use_E.to(tl.int8), mask=expert < E)

    num_loads = 0
    given_E, place_E = tl.full([E2], -1, tl.int32), tl.zeros([E2], tl.int32)
    # All experts resident is the common case of a good cache, and sorting is the dear part.
    if num_missing > 0:
        if EVICT:
            read_S = tl.gather(count_E, tl.maximum(expert_S, 0), 0) > 0
            free_S = (stamp_S < now) & ~(read_S & (expert_S >= 0))
        else:
            free_S = expert_S == -1
        num_loads, given_E, place_E = replace(
            missing_E, num_missing, free_S & (slot < S), expert_S, stamp_S, now,
            slot_of_E, expert_of_S, stamp_of_S, load_expert, load_slot, stream_expert,
            rank, rank_stride, rank_row, E2, S2,
        )  # fmt: skip
    num_streams = num_missing - num_loads
    tl.store(num_loads_ptr, num_loads)
    tl.store(num_streams_ptr, num_streams)
    # The order of Counter: active, hits, loads, streams.
    steps = tl.where(counter == 0, num_hits + num_missing, num_hits)
    steps = tl.where(counter == 2, num_loads, tl.where(counter == 3, num_streams, steps))
    tl.store(counters + counter, totals + steps)

    if arrival is not None:
        write_arrivals(arrival, hit_E, slot_E, given_E, place_E, num_loads, E, PARTS)

    if sorted_pair is not None:
        first_E, blocks_E = first_blocks(count_E, BLOCK_M)
        write_blocks(
            count_E, first_E, blocks_E, num_ids, sorted_pair, expert_of_block, num_blocks, BLOCK_M
        )
        place_pairs(ids, 0, num_ids, first_E * BLOCK_M, sorted_pair, E, E2, RANK_CHUNK)

    if log is not None:
        for first in range(0, num_logged, COUNT_CHUNK):
            pair = first + tl.arange(0, COUNT_CHUNK)
            kept = tl.load(chosen + pair, mask=pair < num_logged, other=0)
            tl.store(log + pair, kept.to(tl.int16), mask=pair < num_logged)

    # Every thread has read the clock before any thread moves it.
    tl.debug_barrier()
    tl.store(clock, now + 1)


@triton.jit(do_not_specialize=["first", "rows"])
def wave_map_kernel(
    stream_expert, num_streams, first, rows, row_of_E, E: tl.constexpr, E2: tl.constexpr
):
    """See ``wave_map``."""
    entry = tl.arange(0, E2)
    stop = tl.minimum(tl.load(num_streams), first + rows)
    in_wave = (entry >= first) & (entry < stop)
    expert = tl.load(stream_expert + entry, mask=in_wave, other=0)
    tl.store(row_of_E + entry, tl.full([E2], -1, tl.int32), mask=entry < E)
    # The same entry may be cleared by one thread and set by another.
    tl.debug_barrier()
    tl.store(row_of_E + expert, entry - first, mask=in_wave)
