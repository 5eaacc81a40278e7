# mypy: ignore-errors
"""Triton bodies of ``predict``: one token's demand, and what a step teaches.

Legend: E experts, K choices a token, N stored matrices; E2 and K2 are rounded up to powers of two.
"""

import triton
import triton.language as tl

from vllm_moe_offload.kernels import fixed_point

FRACTION_BITS = tl.constexpr(fixed_point.FRACTION_BITS)
FRACTIONS = tl.constexpr(1 << fixed_point.FRACTION_BITS)
FRACTION_MASK = tl.constexpr((1 << fixed_point.FRACTION_BITS) - 1)
ONE = tl.constexpr(fixed_point.ONE)
ROUNDS = tl.constexpr(fixed_point.ROUNDS)
PART_SHIFT = tl.constexpr(40 - fixed_point.ONE_BITS)
HALF_SHIFT = tl.constexpr(fixed_point.HALF_SHIFT)
LARGEST_SHIFT = tl.constexpr(fixed_point.LARGEST_SHIFT)
LIMIT = tl.constexpr(fixed_point.LIMIT)
RECENT_BITS = tl.constexpr(fixed_point.RECENT_BITS)
RECENT_CHOICE_SHIFT = tl.constexpr(fixed_point.RECENT_BITS - fixed_point.RECENT_CHOICE_BITS)
RECENT_GAIN = tl.constexpr(fixed_point.RECENT_GAIN)
RECENT_FADE = tl.constexpr(fixed_point.RECENT_FADE)

IMPOSSIBLE = tl.constexpr(-(1 << 30))
"""Logit of what is no expert."""

PAIRS = tl.constexpr(1024)
"""Routed ids that are counted at once."""


@triton.jit
def power(down, powers):
    """Two to the power of minus ``down``, which is not negative."""
    weight = tl.load(powers + (down & FRACTION_MASK))
    return weight >> tl.minimum(down >> FRACTION_BITS, LARGEST_SHIFT)


@triton.jit
def share_out(weight, count):
    """Give each expert its part of the count, at most one."""
    is_full = weight < 0
    part = weight.to(tl.int64)
    for _ in tl.static_range(ROUNDS):
        left = tl.where(is_full, 0, weight)
        left_count = tl.maximum(count - tl.sum(is_full.to(tl.int32), 0), 0).to(tl.int64)
        scale = (left_count << 40) // tl.maximum(tl.sum(left, 0), 1).to(tl.int64)
        part = (left.to(tl.int64) * scale) >> PART_SHIFT
        is_full = is_full | (part >= ONE)
    return tl.where(is_full, ONE, part.to(tl.int32))


@triton.jit
def markov_demand(
    ids_K, evidence, bias, powers, E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr
):
    """Share out a token's choices by the evidence of its experts."""
    expert = tl.arange(0, E2)
    inside = expert < E
    logit = tl.load(bias + expert, mask=inside, other=IMPOSSIBLE)
    count = 0
    for k in tl.static_range(K):
        chosen = tl.load(ids_K + k).to(tl.int32)
        row = evidence + tl.maximum(chosen, 0) * E + expert
        logit += tl.load(row, mask=inside & (chosen >= 0), other=0).to(tl.int32)
        count += (chosen >= 0).to(tl.int32)
    weight = tl.where(inside, power(tl.max(logit, 0) - logit, powers), 0)
    return share_out(weight, count)


@triton.jit
def eam_demand(
    ids_K, token, counts, inverse_norm, size, products,
    E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Share out a token's choices as the matrix does that it is most similar to so far."""
    expert, matrix = tl.arange(0, E2), tl.arange(0, N)
    product = tl.zeros([N], tl.int32)
    if not FIRST:
        product = tl.load(products + token * N + matrix)
    count = 0
    for k in tl.static_range(K):
        chosen = tl.load(ids_K + k).to(tl.int32)
        row = counts + tl.maximum(chosen, 0) * N + matrix
        product += tl.load(row, mask=(matrix >= 0) & (chosen >= 0), other=0).to(tl.int32)
        count += (chosen >= 0).to(tl.int32)
    # With few matrices several threads read the same: all have before one writes it.
    tl.debug_barrier()
    tl.store(products + token * N + matrix, product)
    stored = tl.load(size)
    similarity = product.to(tl.float32) * tl.load(inverse_norm + matrix)
    best = tl.argmax(tl.where(matrix < stored, similarity, -1.0), 0, tie_break_left=True)
    column = counts + (E + expert).to(tl.int64) * N + best
    found = tl.load(column, mask=(expert < E) & (stored > 0), other=0).to(tl.int32)
    return share_out(found, count)


@triton.jit
def gate_demand(ids_K, token, logits, powers, E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr):
    """Want what the gate chooses, the more the further it is from the border."""
    expert = tl.arange(0, E2)
    inside = expert < E
    count = 0
    for k in tl.static_range(K):
        count += (tl.load(ids_K + k) >= 0).to(tl.int32)
    scaled = tl.load(logits + token * E + expert, mask=inside, other=0.0).to(tl.float32)
    scaled = scaled * FRACTIONS
    scaled = tl.minimum(tl.maximum(scaled, -LIMIT), LIMIT)
    logit = tl.where(inside, tl.floor(scaled + 0.5).to(tl.int32), IMPOSSIBLE)
    descending = tl.sort(logit, descending=True)
    border = tl.sum(tl.where(expert == K - 1, descending, 0), 0)
    margin = logit - border
    half = power(tl.abs(margin), powers) >> HALF_SHIFT
    wanted = tl.where(margin >= 0, ONE - half, half)
    return tl.where(inside & (count > 0), wanted, 0)


@triton.jit
def token_demand(
    ids, token, table_0, table_1, table_2, table_3,
    E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """One token's demand for each expert of the next layer, by the predictor ``KIND``."""
    ids_K = ids + token * K
    if KIND == "markov":
        wanted = markov_demand(ids_K, table_0, table_1, table_2, E, E2, K)
    elif KIND == "eam":
        wanted = eam_demand(
            ids_K, token, table_0, table_1, table_2, table_3, E, E2, K, N, FIRST
        )  # fmt: skip
    else:
        wanted = gate_demand(ids_K, token, table_0, table_2, E, E2, K)
    return wanted


@triton.jit(do_not_specialize_on_alignment=["table_0", "table_1"])
def demand_kernel(
    ids, demand, rows, table_0, table_1, table_2, table_3,
    E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Add a token's demand to that of the others; integers do not mind the order."""
    expert = tl.arange(0, E2)
    if tl.load(rows) >= 0:
        wanted = token_demand(
            ids, tl.program_id(0), table_0, table_1, table_2, table_3, E, E2, K, N, FIRST, KIND
        )
        tl.atomic_add(demand + expert, wanted, mask=(expert < E) & (wanted > 0))


@triton.jit(do_not_specialize=["num_tokens", "stride", "L"])
def learn_transitions_kernel(
    ids, num_tokens, stride, count, use, recent, prior, bias, of_recent, tokens, L,
    E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    """See ``learn_transitions_torch``: what concerns one layer and the one after it."""
    layer = tl.program_id(0)
    expert, k = tl.arange(0, E2), tl.arange(0, K2)
    inside, is_choice = expert < E, k < K
    own = ids + layer * stride * K
    num_active = 0
    for token in range(num_tokens):
        before_K = tl.load(own + token * K + k, mask=is_choice, other=-1)
        num_active += (tl.max(before_K, 0) >= 0).to(tl.int32)
        if layer + 1 < L:
            after_K = tl.load(own + (stride + token) * K + k, mask=is_choice, other=-1)
            row_K1 = (layer * E + tl.maximum(before_K, 0))[:, None].to(tl.int64) * E
            place_KK = row_K1 + tl.maximum(after_K, 0)[None, :]
            both_KK = (before_K >= 0)[:, None] & (after_K >= 0)[None, :]
            tl.atomic_add(count + place_KK, tl.full([K2, K2], 1, tl.int32), mask=both_KK)
    uses_E = tl.zeros([E2], tl.int32)
    for first in range(0, num_tokens * K, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        chosen = tl.load(own + pair, mask=pair < num_tokens * K, other=-1)
        uses_E += tl.histogram(tl.maximum(chosen, 0), E2, mask=chosen >= 0)
    place = layer * E + expert
    use_E = tl.load(use + place, mask=inside, other=0) + uses_E
    recent_E = tl.load(recent + place, mask=inside, other=0)
    recent_E = ((recent_E * RECENT_FADE) >> RECENT_BITS) + RECENT_GAIN * (uses_E > 0).to(tl.int32)
    prior_E = tl.load(prior + place, mask=inside, other=0)
    prior_E += tl.load(of_recent + (recent_E >> RECENT_CHOICE_SHIFT))
    # Every thread has read the tables before any thread writes them.
    tl.debug_barrier()
    tl.store(use + place, use_E, mask=inside)
    tl.store(recent + place, recent_E, mask=inside)
    tl.store(bias + place, prior_E, mask=inside)
    if layer == 0:
        tl.store(tokens, tl.load(tokens) + num_active)
