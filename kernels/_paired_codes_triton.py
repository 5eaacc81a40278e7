# mypy: ignore-errors
"""Products with tiles of 4-bit codes, pieces of ``quantised_mlp``'s Triton bodies.

Legend: M rows, N columns and K terms of a tile, G groups of terms with one scale.
"""

import triton
import triton.language as tl

from vllm_moe_offload.kernels._decode_triton import (
    in_order_of_codes,
    minus_zeros,
    nibbles,
    over_terms,
    scale_as,
)


@triton.jit
def per_group(
    tensor, row, first, SCALE_TERMS: tl.constexpr, TERMS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Load what a tile's groups share, [G, BLOCK_N], zeros past the last group.

    By a mask, not by a bound of the group: only so does the compiler know that neighbouring groups
    lie side by side, and has neighbouring lanes read them.
    """
    GROUPS: tl.constexpr = (BLOCK_K + SCALE_TERMS - 1) // SCALE_TERMS
    group = first // SCALE_TERMS + tl.arange(0, GROUPS)
    EMPTY: tl.constexpr = 0 if tensor.dtype.element_ty.is_int() else 0.0
    if TERMS % BLOCK_K == 0:
        tile_GN = tl.load(tensor + row[None, :] + group[:, None])
    else:
        inside = (group * SCALE_TERMS < TERMS)[:, None]
        tile_GN = tl.load(tensor + row[None, :] + group[:, None], mask=inside, other=EMPTY)
    return tile_GN


@triton.jit
def _words(a_rows, a_mask, first, TERMS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a tile's activations, [BLOCK_M, BLOCK_K / 2] words.

    In shared memory 16 words of every row come before the next 16: lanes read four words of each
    of two rows at a time, which have to be in different banks.
    """
    BLOCK_M: tl.constexpr = a_rows.shape[0]
    part = tl.arange(0, BLOCK_K // 32)[:, None, None] * 16
    place = first // 2 + part + tl.arange(0, 16)[None, None, :]
    mask = a_mask[None, :, None]
    if TERMS % BLOCK_K != 0:
        mask = mask & (place < TERMS // 2)
    words = tl.load(a_rows[None, :, None] + place, mask=mask, other=0)
    return words.permute(1, 0, 2).reshape(BLOCK_M, BLOCK_K // 2)


@triton.jit
def _even_and_odd(
    a_rows, a_mask, first, TERMS: tl.constexpr, BLOCK_K: tl.constexpr, APART: tl.constexpr,
    of, dtype,
):  # fmt: skip
    """Load a tile's even and odd terms, [BLOCK_M, BLOCK_K / 2] each, as ``dtype``.

    Two values of 16 bits come as one word, float32 by themselves. Within the halves the terms are
    in the order of ``nibbles``.
    """
    place = first // 2 + tl.arange(0, BLOCK_K // 2)
    mask = a_mask[:, None]
    if TERMS % BLOCK_K != 0:
        mask = mask & (place < TERMS // 2)[None, :]
    if of == tl.float32:
        at = a_rows[:, None] + 2 * place[None, :]
        even, odd = tl.load(at, mask=mask, other=0.0), tl.load(at + 1, mask=mask, other=0.0)
    else:
        if APART:
            words = _words(a_rows, a_mask, first, TERMS, BLOCK_K)
        else:
            words = tl.load(a_rows[:, None] + place[None, :], mask=mask, other=0)
        words = words.to(tl.uint32, bitcast=True)
        even = (words & 0xFFFF).to(tl.uint16).to(of, bitcast=True)
        odd = (words >> 16).to(tl.uint16).to(of, bitcast=True)
    if APART and dtype != tl.float32:
        even, odd = in_order_of_codes(even), in_order_of_codes(odd)
    return even.to(dtype), odd.to(dtype)


@triton.jit
def paired_codes(
    acc, a_rows, a_mask, codes_of_column, zero, zero_stride, scales_GN, column, first,
    ELEMENTS: tl.constexpr, ZERO: tl.constexpr, SCALE_TERMS: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr, of: tl.constexpr, dtype: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Add the products with a tile of 4-bit codes, first the even terms, then the odd ones.

    ``scales_GN`` are the tile's, None where scales are applied to sums. SWAPPED computes the
    transpose: a product on the tensor cores has 16 columns and 8 pairs then, not 8 and 16.
    """
    # Many rows have the tensor cores read operands from shared memory, which another order of
    # activations makes slower by more than decoding gains.
    APART: tl.constexpr = a_rows.shape[0] <= 16
    even, odd = _even_and_odd(a_rows, a_mask, first, TERMS, BLOCK_K, APART, of, dtype)
    byte = first // 2 + tl.arange(0, BLOCK_K // 2)
    if TERMS % BLOCK_K == 0:
        raw = tl.load(codes_of_column[None, :] + byte[:, None])
    else:
        inside = (byte < TERMS // 2)[:, None]
        raw = tl.load(codes_of_column[None, :] + byte[:, None], mask=inside, other=0)
    minus, factors = None, None
    if zero is not None:
        # Zero points of neighbouring columns share a byte.
        row = column // 2 * zero_stride
        points_GN = per_group(zero, row, first, SCALE_TERMS, TERMS, BLOCK_K)
        points_GN = (points_GN >> (column % 2 * 4).to(tl.uint8)[None, :]) & 0xF
        minus_GN = minus_zeros(points_GN, dtype)
        minus = over_terms(minus_GN, BLOCK_K // 2 // minus_GN.shape[0])
    elif ELEMENTS == "uint4":
        minus = minus_zeros(tl.full(raw.shape, ZERO, tl.int32), dtype)
    if scales_GN is not None:
        factors_GN = scale_as(scales_GN, ELEMENTS, dtype)
        factors = over_terms(factors_GN, BLOCK_K // 2 // factors_GN.shape[0])
    elif ELEMENTS == "e2m1":
        factors = scale_as(tl.full(raw.shape, 1.0, tl.float32), ELEMENTS, dtype)
    b = nibbles(raw, minus, factors, ELEMENTS, False, APART, dtype)
    acc = _dot(even, b, acc, SWAPPED)
    b = nibbles(raw, minus, factors, ELEMENTS, True, APART, dtype)
    return _dot(odd, b, acc, SWAPPED)


@triton.jit
def _dot(a, b, acc, SWAPPED: tl.constexpr):
    if SWAPPED:
        acc = tl.dot(b.T, a.T, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
