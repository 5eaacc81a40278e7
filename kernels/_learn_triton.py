# mypy: ignore-errors
"""Triton bodies of ``learn``: one program a layer, then one that adds up what all layers counted.

Legend: E experts, R orders (the candidates, and last the one that follows LRU's cache), F averages,
N figures of a layer; E2 is E rounded up to a power of two.
"""

import triton
import triton.language as tl

from vllm_moe_offload.kernels import candidates

R = tl.constexpr(candidates.CANDIDATES + 1)
AS_LRU = tl.constexpr(candidates.CANDIDATES)
LRU = tl.constexpr(candidates.LRU)
F = tl.constexpr(len(candidates.FADES))  # written out below, one by one: no list in a kernel
FAINT = tl.constexpr(candidates.FAINT)
RANK_STEP = tl.constexpr(1 << candidates.EXPERT_BITS)
RANK_MASK = tl.constexpr(-(1 << candidates.EXPERT_BITS))
NEWEST = tl.constexpr(candidates.MAX_AGE << candidates.EXPERT_BITS)
VOTERS = tl.constexpr((1 << candidates.CANDIDATES) - 1)
FIRST = tl.constexpr(candidates.FIRST)
VOTE_FADE = tl.constexpr(candidates.VOTE_FADE)
SWITCH_MARGIN = tl.constexpr(candidates.SWITCH_MARGIN)
HIT = tl.constexpr(candidates.HIT)
LOSS_RATE = tl.constexpr(candidates.LOSS_RATE)
DEVIATION_PRICE = tl.constexpr(candidates.DEVIATION_PRICE)
STRIDE = tl.constexpr(candidates.STRIDE)

N = tl.constexpr(16)
HITS, ACTIVE, DEVIATION, SLOTS = (tl.constexpr(8 + n) for n in range(4))
"""Figures of a layer: first the hits of each candidate and of LRU's cache, then these."""

CHUNK = tl.constexpr(64)
"""Layers whose figures are added up at once."""


@triton.jit
def least_of_first(key_RE, count_R):
    """Return for each row the least key, from 0 up, that at most ``count_R`` keys reach.

    Built bit by bit: few registers, no exchange between threads but the counts.
    """
    least_R = tl.zeros_like(count_R)
    for step in range(31):
        higher_R = least_R | (1 << (30 - step))
        reached_R = tl.sum((key_RE >= higher_R[:, None]).to(tl.int32), 1)
        least_R = tl.where(reached_R >= count_R, higher_R, least_R)
    return least_R


@triton.jit
def count(flag_E):
    """Count what holds."""
    return tl.sum(flag_E.to(tl.int32), 0)


@triton.jit
def with_use(average_of_E, gain_of, active_E, inside):
    """Load an average and add a use of the active experts."""
    average_E = tl.load(average_of_E, mask=inside, other=0.0)
    return average_E + tl.where(active_E, tl.load(gain_of), 0.0)


@triton.jit
def store_faded(average_of_E, fade_of, average_E, mask):
    """Store an average as the next step finds it."""
    faded_E = tl.maximum(average_E * tl.load(fade_of), FAINT)
    tl.store(average_of_E, tl.where(average_E > 0, faded_E, 0.0), mask=mask)


@triton.jit
def adopt(lru_E, cached_E, num_slots, num_active):
    """Return LRU's cache before the step: the real one unless both are exactly full."""
    is_full = (count(lru_E) == num_slots) & (count(cached_E) == num_slots)
    return tl.where(is_full | (num_active == 0), lru_E, cached_E)


@triton.jit
def admit(active_E, lru_E, num_slots):
    """Return who comes into LRU's cache, who may have to leave it, and how many of these stay."""
    missing_E, evictable_E = active_E & ~lru_E, lru_E & ~active_E
    room = num_slots - count(lru_E)
    num_evictable = count(evictable_E)
    num_victims = tl.minimum(tl.maximum(count(missing_E) - room, 0), num_evictable)
    comes_E = missing_E & (tl.cumsum(missing_E.to(tl.int32), 0) <= room + num_victims)
    return comes_E, evictable_E, num_evictable - num_victims


@triton.jit
def ranks(recency_E, mixed_RE, active_E, expert, row):
    """Rank every expert in every order, in the last one as if LRU's cache were empty."""
    older_E = tl.maximum(recency_E - RANK_STEP, expert)
    recency_RE = tl.where(active_E, expert | NEWEST, older_E)[None, :]
    by_recency_R1 = ((row == LRU) | (row == AS_LRU))[:, None]
    # The bits of floats from 0 up order as the floats do.
    by_use_RE = (mixed_RE.to(tl.int32, bitcast=True) & RANK_MASK) | expert[None, :]
    return tl.where(by_recency_R1, recency_RE, by_use_RE)


@triton.jit
def learn_layers_kernel(
    slot_of, slots, use, rank, average, held, figures, weight, fade, gain,
    E: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    """See ``learn_torch``: everything that concerns one layer."""
    layer = tl.program_id(0)
    expert, row = tl.arange(0, E2), tl.arange(0, R)
    inside = expert < E
    place = layer * E + expert
    use_E = tl.load(use + place, mask=inside, other=0).to(tl.int32)
    slot_E = tl.load(slot_of + place, mask=inside, other=0)
    held_E = tl.load(held + place, mask=inside, other=0)
    recency_E = tl.load(rank + (layer * R + LRU) * E + expert, mask=inside, other=0)
    num_slots = tl.load(slots + layer)

    active_E, cached_E = (use_E & 1) != 0, (use_E & 2) != 0
    num_active = count(active_E)
    lru_E = adopt(held_E >> AS_LRU != 0, cached_E, num_slots, num_active)
    held_E = (held_E & VOTERS) | (lru_E.to(tl.int32) << AS_LRU)
    read_E = tl.where(active_E, held_E, 0)
    hits_R = tl.sum((read_E[None, :] >> row[:, None]) & 1, 1)

    average_of = average + layer * F * E + expert
    average_0 = with_use(average_of, gain, active_E, inside)
    average_1 = with_use(average_of + E, gain + 1, active_E, inside)
    average_2 = with_use(average_of + 2 * E, gain + 2, active_E, inside)
    used_E = average_0 > 0
    mixed_RE = tl.load(weight + row)[:, None] * average_0[None, :]
    mixed_RE += tl.load(weight + R + row)[:, None] * average_1[None, :]
    mixed_RE += tl.load(weight + 2 * R + row)[:, None] * average_2[None, :]
    rank_RE = ranks(recency_E, mixed_RE, active_E, expert, row)

    # One search finds whom each candidate would hold, and whom LRU's cache goes on holding.
    comes_E, evictable_E, num_staying = admit(active_E, lru_E, num_slots)
    key_RE = tl.where(used_E[None, :], rank_RE + active_E.to(tl.int32)[None, :] * FIRST, -1)
    is_last_R1 = (row == AS_LRU)[:, None]
    key_RE = tl.where(is_last_R1, tl.where(evictable_E, recency_E, -1)[None, :], key_RE)
    count_R = tl.where(row == AS_LRU, num_staying, num_slots)
    is_held_RE = key_RE >= least_of_first(key_RE, count_R)[:, None]
    held_E = tl.sum(is_held_RE.to(tl.int32) << row[:, None], 0)
    lru_E = (held_E >> AS_LRU != 0) | (lru_E & active_E) | comes_E
    held_E = (held_E & VOTERS) | (lru_E.to(tl.int32) << AS_LRU)
    rank_RE += (is_last_R1 & lru_E[None, :]).to(tl.int32) * FIRST

    more_R = tl.where(row == HITS - R, count(active_E & cached_E), num_slots)
    more_R = tl.where(row == ACTIVE - R, num_active, more_R)
    more_R = tl.where(row == DEVIATION - R, count(lru_E & (slot_E < 0)), more_R)
    tl.store(figures + layer * N + row, hits_R)
    tl.store(figures + layer * N + R + row, more_R)
    # Every thread has read the tables before any thread writes them.
    tl.debug_barrier()
    learns = inside & (num_active > 0)
    rank_of_RE = rank + (layer * R + row)[:, None] * E + expert[None, :]
    tl.store(rank_of_RE, rank_RE, mask=learns[None, :])
    tl.store(held + place, held_E, mask=learns)
    store_faded(average_of, fade, average_0, learns)
    store_faded(average_of + E, fade + 1, average_1, learns)
    store_faded(average_of + 2 * E, fade + 2, average_2, learns)
    tl.store(use + place, tl.zeros_like(use_E).to(tl.int8), mask=inside)


@triton.jit
def figure(total_N, place: tl.constexpr):
    """One of the sums."""
    return tl.sum(tl.where(tl.arange(0, N) == place, total_N, 0), 0)


@triton.jit(do_not_specialize=["L"])
def choose_kernel(figures, votes, standing, row_of_L, L):
    """See ``learn_torch``: what all layers decide together, and by which order each evicts."""
    layer, n = tl.arange(0, CHUNK), tl.arange(0, N)
    total_N = tl.zeros([N], tl.int64)
    for first in range(0, L, CHUNK):
        inside = (first + layer < L)[:, None] & (n >= 0)[None, :]
        of_layer = figures + (first + layer)[:, None] * N + n[None, :]
        total_N += tl.sum(tl.load(of_layer, mask=inside, other=0), 0)
    active = figure(total_N, ACTIVE)
    lead = figure(total_N, HITS) - figure(total_N, AS_LRU)
    balance = tl.load(standing)
    leader = tl.load(standing + 1)
    turn = tl.load(standing + 2)

    is_vote = n < AS_LRU
    votes_N = tl.load(votes + n, mask=is_vote, other=0.0) + total_N.to(tl.float32)
    most = tl.max(tl.where(is_vote, votes_N, -1.0), 0)
    best = tl.min(tl.where(is_vote & (votes_N == most), n, N), 0)
    followed = tl.sum(tl.where(n == leader, votes_N, 0.0), 0)
    is_ahead = most - followed > L.to(tl.float32) * SWITCH_MARGIN
    if active > 0:
        leader = tl.where(is_ahead, best.to(tl.int64), leader)
        ceiling = (figure(total_N, SLOTS) + L) * HIT
        balance = tl.minimum(balance + lead * HIT + active * LOSS_RATE, ceiling)
        turn = (turn + STRIDE) % L
    deviation = figure(total_N, DEVIATION)
    # Every thread has read the standing before any thread writes it.
    tl.debug_barrier()
    tl.store(votes + n, votes_N * VOTE_FADE, mask=is_vote & (active > 0))
    tl.store(standing, balance)
    tl.store(standing + 1, leader)
    tl.store(standing + 2, turn)
    for first in range(0, L, CHUNK):
        place = first + layer
        is_free = (1 + (place + turn) % L + deviation) * DEVIATION_PRICE <= balance
        chosen = tl.where(is_free, leader, AS_LRU)
        tl.store(row_of_L + place, chosen.to(tl.int32), mask=place < L)
