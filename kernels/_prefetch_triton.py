# mypy: ignore-errors
"""Triton body of ``look_ahead``: one program, so that no two threads meet in memory.

Legend: E experts, S slots, K choices a token; E2 and S2 are rounded up to powers of two.
"""

import triton
import triton.language as tl

from vllm_moe_offload.kernels import fixed_point
from vllm_moe_offload.kernels._dispatch_triton import count_experts, load_ids
from vllm_moe_offload.kernels._predict_triton import token_demand
from vllm_moe_offload.kernels._resolve_triton import oldest_first
from vllm_moe_offload.kernels.resolve import Counter

LEAST_DEMAND = tl.constexpr(fixed_point.LEAST_DEMAND)
MOST_DEMAND = tl.constexpr(fixed_point.MOST_DEMAND)
EXPERT_BITS = tl.constexpr(fixed_point.EXPERT_BITS)
EXPERT_MASK = tl.constexpr((1 << fixed_point.EXPERT_BITS) - 1)
PAIRS = tl.constexpr(1024)
"""Routed ids that are kept and counted at once."""

PREFETCHED = tl.constexpr(int(Counter.PREFETCHED))
PREFETCH_HITS = tl.constexpr(int(Counter.PREFETCH_HITS))
GUESSED = tl.constexpr(int(Counter.GUESSED))
FOUND = tl.constexpr(int(Counter.FOUND))
FORESEEABLE = tl.constexpr(int(Counter.FORESEEABLE))


@triton.jit
def add_counter(counters, place: tl.constexpr, count):
    """Add to one counter."""
    tl.store(counters + place, tl.load(counters + place) + count)


@triton.jit
def judge(active_E, ahead, slot_of_E, stamp_of_S, counters, E: tl.constexpr, E2: tl.constexpr):
    """Count what came true, and stamp what was fetched in vain so that it goes first under LRU."""
    expert = tl.arange(0, E2)
    ahead_E = tl.load(ahead + expert, mask=expert < E, other=0).to(tl.int32)
    # Without a guess there is nothing to count: the first layer never has one.
    if tl.max(ahead_E, 0) > 0:
        guessed_E, fetched_E = (ahead_E & 1) != 0, (ahead_E & 2) != 0
        add_counter(counters, GUESSED, tl.sum(guessed_E.to(tl.int32), 0))
        add_counter(counters, FOUND, tl.sum((guessed_E & active_E).to(tl.int32), 0))
        add_counter(counters, FORESEEABLE, tl.sum(active_E.to(tl.int32), 0))
        add_counter(counters, PREFETCH_HITS, tl.sum((fetched_E & active_E).to(tl.int32), 0))
        slot_E = tl.load(slot_of_E + expert, mask=expert < E, other=-1)
        wasted_E = fetched_E & ~active_E & (slot_E >= 0)
        # Every thread has read the marks before any thread clears them.
        tl.debug_barrier()
        tl.store(stamp_of_S + slot_E, tl.full([E2], -1, tl.int64), mask=wasted_E)
        tl.store(ahead + expert, tl.zeros([E2], tl.int8), mask=expert < E)


@triton.jit
def fetch(
    demand_E, num_guesses, rows, ahead, slot_of_E, expert_of_S, stamp_of_S, clock, S,
    load_expert, load_slot, num_loads, counters, rank, rank_stride, rank_row,
    E: tl.constexpr, E2: tl.constexpr, S2: tl.constexpr,
):  # fmt: skip
    """Mark the guess, and give slots to what is missing of it."""
    expert, slot = tl.arange(0, E2), tl.arange(0, S2)
    demand_E = tl.minimum(demand_E, MOST_DEMAND)
    key_E = (demand_E << EXPERT_BITS) | (EXPERT_MASK - expert)
    key = tl.sort(key_E, descending=True)
    guessed = (expert < num_guesses) & ((key >> EXPERT_BITS) > 0)
    of_guess = EXPERT_MASK - (key & EXPERT_MASK)
    last = tl.min(tl.where(guessed, key, 0x7FFFFFFF), 0)
    guessed_E = (key_E >= last) & (demand_E > 0)

    slot_E = tl.load(slot_of_E + expert, mask=expert < E, other=-1)
    is_absent = tl.gather(slot_E, of_guess, 0) < 0
    wanted = guessed & is_absent & ((key >> EXPERT_BITS) >= LEAST_DEMAND)
    num_fetched = tl.minimum(rows, tl.sum(wanted.to(tl.int32), 0))
    fetched = wanted & (expert < 0)
    # All guessed experts resident is common, and sorting is the dear part.
    if num_fetched > 0:
        expert_S = tl.load(expert_of_S + slot, mask=slot < S, other=-1)
        stamp_S = tl.load(stamp_of_S + slot, mask=slot < S, other=0)
        now = tl.load(clock)
        kept_S = tl.gather(guessed_E.to(tl.int32), tl.maximum(expert_S, 0), 0) > 0
        free_S = (stamp_S < now) & ~(kept_S & (expert_S >= 0)) & (slot < S)
        num_fetched = tl.minimum(num_fetched, tl.sum(free_S.to(tl.int32), 0))
        victims = oldest_first(free_S, expert_S, stamp_S, rank, rank_stride, rank_row, E2, S2)
        place = tl.cumsum(wanted.to(tl.int32), 0) - 1
        fetched = wanted & (place < num_fetched)
        victim = tl.gather(victims, tl.where(fetched, place, 0), 0)
        evicted = tl.gather(expert_S, victim, 0)
        # Every thread has read the tables before any thread writes them.
        tl.debug_barrier()
        # An evicted expert had a slot and a fetched one had none, so these two never collide.
        tl.store(slot_of_E + evicted, tl.full([E2], -1, tl.int32), mask=fetched & (evicted >= 0))
        tl.store(slot_of_E + of_guess, victim, mask=fetched)
        tl.store(expert_of_S + victim, of_guess, mask=fetched)
        tl.store(stamp_of_S + victim, tl.zeros_like(victim).to(tl.int64) + now - 1, mask=fetched)
        tl.store(load_expert + place, of_guess, mask=fetched)
        tl.store(load_slot + place, victim, mask=fetched)
        add_counter(counters, PREFETCHED, num_fetched)
    marks = guessed.to(tl.int32) + 2 * fetched.to(tl.int32)
    tl.store(ahead + of_guess, marks.to(tl.int8), mask=guessed)
    tl.store(num_loads, num_fetched)


@triton.jit(
    do_not_specialize=["num_tokens", "S"],
    do_not_specialize_on_alignment=["own_slot_of_E", "slot_of_E", "rank_row", "table_0", "table_1"],
)
def look_ahead_kernel(
    ids, num_tokens, kept, rows_ptr, demand,
    own_ahead, own_slot_of_E, own_stamp_of_S, own_counters,
    ahead, slot_of_E, expert_of_S, stamp_of_S, clock, S,
    load_expert, load_slot, num_loads, counters, rank, rank_stride, rank_row,
    table_0, table_1, table_2, table_3,
    E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, S2: tl.constexpr, N: tl.constexpr,
    FIRST: tl.constexpr, KIND: tl.constexpr, FUSED: tl.constexpr, HAS_NEXT: tl.constexpr,
):  # fmt: skip
    """See ``look_ahead_torch``; what follows ``own_counters`` belongs to the next layer.

    ``rank``, its stride and row are None where LRU rules there.
    """
    expert = tl.arange(0, E2)
    rows = tl.load(rows_ptr)
    if rows < 0:
        for first in range(0, num_tokens * K, PAIRS):
            pair = first + tl.arange(0, PAIRS)
            chosen = load_ids(ids, pair, num_tokens * K, E)
            tl.store(kept + pair, chosen, mask=pair < num_tokens * K)
        if HAS_NEXT:
            tl.store(num_loads, 0)
    else:
        count_E = tl.zeros([E2], tl.int32)
        for first in range(0, num_tokens * K, PAIRS):
            pair = first + tl.arange(0, PAIRS)
            chosen = load_ids(ids, pair, num_tokens * K, E)
            tl.store(kept + pair, chosen, mask=pair < num_tokens * K)
            count_E += count_experts(chosen, E2)
        active_E = count_E > 0
        judge(active_E, own_ahead, own_slot_of_E, own_stamp_of_S, own_counters, E, E2)
        if HAS_NEXT:
            if FUSED:
                demand_E = tl.zeros([E2], tl.int32)
                for token in range(num_tokens):
                    demand_E += token_demand(
                        ids, token, table_0, table_1, table_2, table_3, E, E2, K, N, FIRST, KIND
                    )
            else:
                demand_E = tl.load(demand + expert, mask=expert < E, other=0)
                # With few experts several threads read the same: all have before one clears it.
                tl.debug_barrier()
                tl.store(demand + expert, tl.zeros([E2], tl.int32), mask=expert < E)
            fetch(
                demand_E, tl.sum(active_E.to(tl.int32), 0), rows,
                ahead, slot_of_E, expert_of_S, stamp_of_S, clock, S,
                load_expert, load_slot, num_loads, counters, rank, rank_stride, rank_row,
                E, E2, S2,
            )  # fmt: skip
