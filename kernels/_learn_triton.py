# mypy: ignore-errors
"""Triton bodies of ``learn``: programs for the pairs of experts, one a layer, then one for all.

Legend: E experts, W some rows of a table of pairs, R orders (the candidates, and last the one that
follows LRU's cache), F averages, N figures of a layer; E2 is E rounded up to a power of two.
"""

import triton
import triton.language as tl

from vllm_moe_offload.kernels import candidates

R = tl.constexpr(candidates.CANDIDATES + 1)
AS_LRU = tl.constexpr(candidates.AS_LRU)
LRU = tl.constexpr(candidates.LRU)
F = tl.constexpr(len(candidates.FADES))  # written out below, one by one: no list in a kernel
FAINT = tl.constexpr(candidates.FAINT)
RANK_STEP = tl.constexpr(1 << candidates.EXPERT_BITS)
RANK_MASK = tl.constexpr(-(1 << candidates.EXPERT_BITS))
NEWEST = tl.constexpr(candidates.MAX_AGE << candidates.EXPERT_BITS)
SEQUEL = tl.constexpr(candidates.SEQUEL)
SEQUEL_UNIT = tl.constexpr(candidates.SEQUEL_UNIT)
SEQUEL_SHIFT = tl.constexpr(candidates.SEQUEL_SHIFT)
SEQUEL_SCALE = tl.constexpr(candidates.SEQUEL_SCALE)
NUM_SOON = tl.constexpr(len(candidates.SOON))
LAST_SOON = tl.constexpr(candidates.SOON[-1])
HISTORY = tl.constexpr((1 << (candidates.SOON[-1] + 1)) - 1)
FIRST = tl.constexpr(candidates.FIRST)
LOWER_FIRST = tl.constexpr(candidates.LOWER_FIRST)
VOTE_FADE = tl.constexpr(candidates.VOTE_FADE)
SWITCH_MARGIN = tl.constexpr(candidates.SWITCH_MARGIN)
HIT = tl.constexpr(candidates.HIT)
LOSS_RATE = tl.constexpr(candidates.LOSS_RATE)
DEVIATION_PRICE = tl.constexpr(candidates.DEVIATION_PRICE)
STRIDE = tl.constexpr(candidates.STRIDE)

N = tl.constexpr(16)
HITS, ACTIVE, DEVIATION, SLOTS, CONTESTED = (tl.constexpr(8 + n) for n in range(5))
"""Figures of a layer: first the hits of each candidate's cache, then these."""

CHUNK = tl.constexpr(64)
"""Layers whose figures are added up at once."""


@triton.jit
def count(flag_E):
    """Count what holds."""
    return tl.sum(flag_E.to(tl.int32), 0)


@triton.jit
def with_step(history_E, active_E):
    """Shift the step into the history of uses."""
    return ((history_E << 1) | active_E.to(tl.int32)) & HISTORY


@triton.jit
def learn_sequels_kernel(
    use, history, sequel, expected, E: tl.constexpr, E2: tl.constexpr, ROWS: tl.constexpr
):
    """See ``learn_torch``: some rows of a layer's table of pairs; reads only rows that it needs."""
    layer = tl.program_id(0)
    expert, row = tl.arange(0, E2), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside, row_inside = expert < E, row < E
    place, row_place = layer * E + expert, layer * E + row
    active_E = (tl.load(use + place, mask=inside, other=0).to(tl.int32) & 1) != 0
    history_E = with_step(tl.load(history + place, mask=inside, other=0).to(tl.int32), active_E)
    asked_W = (tl.load(use + row_place, mask=row_inside, other=0).to(tl.int32) & 1) != 0
    history_W = tl.load(history + row_place, mask=row_inside, other=0).to(tl.int32)
    learns_W = (with_step(history_W, asked_W) >> LAST_SOON != 0) & (count(active_E) > 0)

    uses_E = history_E & 1
    for n in tl.static_range(1, NUM_SOON):
        uses_E += (history_E >> n) & 1
    of_pair = sequel + (layer * E + row).to(tl.int64)[:, None] * E + expert[None, :]
    needed = (learns_W | asked_W)[:, None] & inside[None, :]
    sequel_WE = tl.load(of_pair, mask=needed, other=0).to(tl.int32)
    learnt_WE = sequel_WE + ((SEQUEL_UNIT * uses_E[None, :] - sequel_WE) >> SEQUEL_SHIFT)
    sequel_WE = tl.where(learns_W[:, None], learnt_WE, sequel_WE)
    tl.store(of_pair, sequel_WE.to(tl.int16), mask=learns_W[:, None] & inside[None, :])
    expected_E = tl.sum(tl.where(asked_W[:, None], sequel_WE, 0), 0)
    # Sums of integers do not depend on the order in which the programs add.
    tl.atomic_add(expected + place, expected_E, mask=inside & (expected_E != 0))


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
def count_in_rows(flag_RE):
    """Count what holds in each row."""
    return tl.sum(flag_RE.to(tl.int32), 1)


@triton.jit
def adopt(held_RE, cached_E, num_slots, num_active):
    """Return the candidates' caches before the step: the real one unless both are exactly full."""
    is_full_R = (count_in_rows(held_RE) == num_slots) & (count(cached_E) == num_slots)
    return tl.where((is_full_R | (num_active == 0))[:, None], held_RE, cached_E[None, :])


@triton.jit
def admit(active_E, held_RE, rank_RE, expert, row, num_slots):
    """Return the candidates' caches after the step, each by its own order.

    Either all of the missing come, and some of the evictable stay, or some come and none stays.
    """
    active_RE = active_E[None, :]
    missing_RE, evictable_RE = active_RE & ~held_RE, held_RE & ~active_RE
    num_evictable_R = count_in_rows(evictable_RE)
    most_coming_R = num_slots - count_in_rows(held_RE) + num_evictable_R
    left_R = most_coming_R - count_in_rows(missing_RE)
    all_come_R1 = (left_R >= 0)[:, None]
    num_chosen_R = tl.where(left_R >= 0, tl.minimum(left_R, num_evictable_R), most_coming_R)
    is_by_id_R1 = (row == LRU)[:, None] & ~all_come_R1
    rank_RE = tl.where(is_by_id_R1, (expert ^ LOWER_FIRST)[None, :], rank_RE)
    key_RE = tl.where(tl.where(all_come_R1, evictable_RE, missing_RE), rank_RE, -1)
    chosen_RE = key_RE >= least_of_first(key_RE, num_chosen_R)[:, None]
    return chosen_RE | (held_RE & active_RE) | (missing_RE & all_come_R1)


@triton.jit
def ranks(recency_E, mixed_RE, expected_E, active_E, expert, row):
    """Rank every expert in every order, in the last one as if LRU's cache were empty."""
    older_E = tl.maximum(recency_E - RANK_STEP, expert)
    recency_RE = tl.where(active_E, expert | NEWEST, older_E)[None, :]
    by_recency_R1 = ((row == LRU) | (row == AS_LRU))[:, None]
    in_units_RE = (mixed_RE * SEQUEL_UNIT).to(tl.int32)
    expected_RE = expected_E[None, :] + count(active_E) * in_units_RE
    sequel_RE = expected_RE.to(tl.float32) * SEQUEL_SCALE
    score_RE = tl.where((row == SEQUEL)[:, None], sequel_RE, mixed_RE)
    # The bits of floats from 0 up order as the floats do.
    by_use_RE = (score_RE.to(tl.int32, bitcast=True) & RANK_MASK) | expert[None, :]
    return tl.where(by_recency_R1, recency_RE, by_use_RE)


@triton.jit
def learn_layers_kernel(
    slot_of, slots, use, rank, average, history, expected, held, figures, weight, fade, gain,
    E: tl.constexpr, E2: tl.constexpr,
):  # fmt: skip
    """See ``learn_torch``: everything else that concerns one layer."""
    layer = tl.program_id(0)
    expert, row = tl.arange(0, E2), tl.arange(0, R)
    inside = expert < E
    place = layer * E + expert
    use_E = tl.load(use + place, mask=inside, other=0).to(tl.int32)
    slot_E = tl.load(slot_of + place, mask=inside, other=0)
    held_E = tl.load(held + place, mask=inside, other=0)
    history_E = tl.load(history + place, mask=inside, other=0).to(tl.int32)
    expected_E = tl.load(expected + place, mask=inside, other=0)
    num_slots = tl.load(slots + layer)
    rank_of_RE = rank + (layer * R + row)[:, None] * E + expert[None, :]
    rank_RE = tl.load(rank_of_RE, mask=inside[None, :], other=0)
    recency_E = tl.load(rank + (layer * R + LRU) * E + expert, mask=inside, other=0)

    active_E, cached_E = (use_E & 1) != 0, (use_E & 2) != 0
    num_active = count(active_E)
    held_RE = (held_E[None, :] >> row[:, None]) & 1 != 0
    held_RE = adopt(held_RE, cached_E, num_slots, num_active)
    hits_R = count_in_rows(held_RE & active_E[None, :])
    held_RE = admit(active_E, held_RE, rank_RE, expert, row, num_slots)
    held_RE = held_RE & (row != AS_LRU)[:, None]
    held_E = tl.sum(held_RE.to(tl.int32) << row[:, None], 0)
    lru_E = (held_E >> LRU) & 1

    average_of = average + layer * F * E + expert
    average_0 = with_use(average_of, gain, active_E, inside)
    average_1 = with_use(average_of + E, gain + 1, active_E, inside)
    average_2 = with_use(average_of + 2 * E, gain + 2, active_E, inside)
    mixed_RE = tl.load(weight + row)[:, None] * average_0[None, :]
    mixed_RE += tl.load(weight + R + row)[:, None] * average_1[None, :]
    mixed_RE += tl.load(weight + 2 * R + row)[:, None] * average_2[None, :]
    rank_RE = ranks(recency_E, mixed_RE, expected_E, active_E, expert, row)
    rank_RE += (row == AS_LRU).to(tl.int32)[:, None] * lru_E[None, :] * FIRST

    num_hits = count(active_E & cached_E)
    contested = tl.where(num_active > num_slots, tl.maximum(num_slots - num_hits, 0), 0)
    more_R = tl.where(row == HITS - R, num_hits, num_slots)
    more_R = tl.where(row == CONTESTED - R, contested, more_R)
    more_R = tl.where(row == ACTIVE - R, num_active, more_R)
    more_R = tl.where(row == DEVIATION - R, count((lru_E != 0) & (slot_E < 0)), more_R)
    tl.store(figures + layer * N + row, hits_R)
    tl.store(figures + layer * N + R + row, more_R)
    # Every thread has read the tables before any thread writes them.
    tl.debug_barrier()
    learns = inside & (num_active > 0)
    tl.store(rank_of_RE, rank_RE, mask=learns[None, :])
    tl.store(held + place, held_E, mask=learns)
    tl.store(history + place, with_step(history_E, active_E).to(tl.int8), mask=learns)
    store_faded(average_of, fade, average_0, learns)
    store_faded(average_of + E, fade + 1, average_1, learns)
    store_faded(average_of + 2 * E, fade + 2, average_2, learns)
    tl.store(expected + place, tl.zeros_like(expected_E), mask=inside)
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
    lead = figure(total_N, HITS) - figure(total_N, LRU)
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
    more = 1 + figure(total_N, CONTESTED) // L
    # Every thread has read the standing before any thread writes it.
    tl.debug_barrier()
    tl.store(votes + n, votes_N * VOTE_FADE, mask=is_vote & (active > 0))
    tl.store(standing, balance)
    tl.store(standing + 1, leader)
    tl.store(standing + 2, turn)
    for first in range(0, L, CHUNK):
        place = first + layer
        is_free = ((1 + (place + turn) % L) * more + deviation) * DEVIATION_PRICE <= balance
        chosen = tl.where(is_free, leader, AS_LRU)
        tl.store(row_of_L + place, chosen.to(tl.int32), mask=place < L)
