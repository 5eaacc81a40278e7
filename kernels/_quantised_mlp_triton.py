# mypy: ignore-errors
"""Triton bodies of ``quantised_mlp``: grouped products over codes, decoded on the way.

Legend: T tokens, K choices a token, P pairs (T K), S rows of experts, H hidden size,
I intermediate size, N columns of the first product, G groups of terms with one scale.
BLOCK_M pairs, BLOCK_N columns and BLOCK_K terms of a tile. What a tile computes depends on its
expert's weights and its pairs only.
"""

import triton
import triton.language as tl

from vllm_moe_offload.kernels._activation_triton import activate
from vllm_moe_offload.kernels._decode_triton import code_scale, e4m3, of_sums, over_terms, uint8
from vllm_moe_offload.kernels._expert_mlp_triton import _tile_of
from vllm_moe_offload.kernels._paired_codes_triton import paired_codes, per_group
from vllm_moe_offload.kernels._quantise_triton import group_factor, quotient, to_e4m3


@triton.jit
def _single_codes(
    codes_of_column, zero, zero_stride, scale, scale_stride, column, first,
    ELEMENTS: tl.constexpr, ZERO: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_TERMS: tl.constexpr, TERMS: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Decode a tile of bytes [BLOCK_K, BLOCK_N] to ``dtype``, with scales finer than BLOCK_K."""
    term = first + tl.arange(0, BLOCK_K)
    if TERMS % BLOCK_K == 0:
        raw = tl.load(codes_of_column[None, :] + term[:, None])
    else:
        raw = tl.load(codes_of_column[None, :] + term[:, None], (term < TERMS)[:, None], 0)
    if ELEMENTS == "e4m3":
        values = e4m3(raw)
    elif zero is None:
        values = uint8(raw) - ZERO
    else:
        points_GN = per_group(zero, column * zero_stride, first, SCALE_TERMS, TERMS, BLOCK_K)
        values = uint8(raw) - over_terms(uint8(points_GN), BLOCK_K // points_GN.shape[0])
    if SCALE_TERMS < BLOCK_K:
        row = column // SCALE_ROWS * scale_stride
        factors_GN = per_group(scale, row, first, SCALE_TERMS, TERMS, BLOCK_K)
        values *= over_terms(code_scale(factors_GN), SCALE_TERMS)
    return values.to(dtype)


@triton.jit
def _whole_terms(
    acc, a_rows, a_mask, input_scale, codes_of_column, zero, zero_stride, scale, scale_stride,
    column, first,
    ELEMENTS: tl.constexpr, ZERO: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_TERMS: tl.constexpr, INPUTS: tl.constexpr, TERMS: tl.constexpr, BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the products with a tile of bytes; nothing has been added before "group here"."""
    term = first + tl.arange(0, BLOCK_K)
    mask = a_mask[:, None]
    if TERMS % BLOCK_K != 0:
        mask = mask & (term < TERMS)[None, :]
    a = tl.load(a_rows[:, None] + term[None, :], mask=mask, other=0.0)
    if INPUTS == "static":
        a = to_e4m3(a.to(tl.float32) * (1.0 / input_scale), UPCAST)
    if INPUTS == "group here":
        values = a.to(tl.float32)
        factor = group_factor(tl.max(tl.abs(values), 1))
        a = to_e4m3(quotient(values, factor[:, None], UPCAST), UPCAST)
    if INPUTS == "none":
        b = _single_codes(
            codes_of_column, zero, zero_stride, scale, scale_stride, column, first,
            ELEMENTS, ZERO, SCALE_ROWS, SCALE_TERMS, TERMS, BLOCK_K,
            tl.float32 if UPCAST else a_rows.dtype.element_ty,
        )  # fmt: skip
    elif TERMS % BLOCK_K == 0:
        b = tl.load(codes_of_column[None, :] + term[:, None])
    else:
        inside = (term < TERMS)[:, None]
        b = tl.load(codes_of_column[None, :] + term[:, None], mask=inside, other=0.0)
    if UPCAST:
        # Interpreted, a product is in float32: it knows neither bfloat16 nor e4m3.
        a, b = a.to(tl.float32), b.to(tl.float32)
    part = tl.dot(a, b, acc, input_precision="ieee")
    if INPUTS == "group here":
        part *= factor[:, None]
    return part


@triton.jit
def _factor(scale_of_column, a_scale, a_mask, group, OF_ROWS: tl.constexpr):
    """Load the scales of a tile's columns and, with OF_ROWS, of its rows."""
    of_column = tl.load(scale_of_column + group)
    of_row = of_column
    if OF_ROWS:
        of_row = tl.load(a_scale + group, mask=a_mask, other=0.0)
    return of_column, of_row


@triton.jit
def _product(  # noqa: PLR0912
    a_rows, a_mask, a_scale, input_scale, codes, code_stride, zero, zero_stride,
    scale, scale_stride, column,
    ELEMENTS: tl.constexpr, ZERO: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_TERMS: tl.constexpr, INPUTS: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr, of: tl.constexpr, SWAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Multiply BLOCK_M rows by BLOCK_N columns over TERMS terms, summed in float32.

    Scales that span at least BLOCK_K terms are applied to sums, others to the decoded tile.
    """
    if SWAPPED:
        acc = tl.zeros([column.shape[0], a_rows.shape[0]], tl.float32)
    else:
        acc = tl.zeros([a_rows.shape[0], column.shape[0]], tl.float32)
    PAIRED: tl.constexpr = ELEMENTS == "uint4" or ELEMENTS == "e2m1"  # noqa: PLR1714
    # Many rows make more sums than codes, and no registers for factors of both.
    FEW_ROWS: tl.constexpr = a_rows.shape[0] <= 32
    OF_SUMS: tl.constexpr = (
        SCALE_TERMS >= BLOCK_K and SCALE_TERMS < TERMS and (FEW_ROWS or not PAIRED)
    )
    AHEAD: tl.constexpr = OF_SUMS and FEW_ROWS
    SCALED: tl.constexpr = PAIRED and SCALE_TERMS < TERMS and not OF_SUMS
    dtype: tl.constexpr = tl.float32 if UPCAST else of
    codes_of_column = codes + column * code_stride
    scale_of_column = scale + column // SCALE_ROWS * scale_stride
    if AHEAD:
        factor = _factor(scale_of_column, a_scale, a_mask, 0, INPUTS == "group")
    for first in range(0, TERMS, BLOCK_K):
        scales_GN = None
        base = tl.zeros_like(acc) if OF_SUMS else acc
        if AHEAD:
            # The next tile's scales are on their way while this one is computed.
            group = tl.minimum(first + BLOCK_K, TERMS - 1) // SCALE_TERMS
            next_factor = _factor(scale_of_column, a_scale, a_mask, group, INPUTS == "group")
        if SCALED:
            # Not a tile ahead: the compiler would spread them over terms before it moves them to
            # the threads that need them, which costs more than the wait.
            row = column // SCALE_ROWS * scale_stride
            scales_GN = per_group(scale, row, first, SCALE_TERMS, TERMS, BLOCK_K)
        if PAIRED:
            part = paired_codes(
                base, a_rows, a_mask, codes_of_column, zero, zero_stride, scales_GN, column, first,
                ELEMENTS, ZERO, SCALE_TERMS, TERMS, BLOCK_K, of, dtype, SWAPPED,
            )  # fmt: skip
        else:
            part = _whole_terms(
                base, a_rows, a_mask, input_scale, codes_of_column, zero, zero_stride,
                scale, scale_stride, column, first,
                ELEMENTS, ZERO, SCALE_ROWS, SCALE_TERMS, INPUTS, TERMS, BLOCK_K, UPCAST,
            )  # fmt: skip
        if OF_SUMS:
            if not AHEAD:
                group = first // SCALE_TERMS
                factor = _factor(scale_of_column, a_scale, a_mask, group, INPUTS == "group")
            of_column, of_row = factor
            if INPUTS == "group":
                part *= of_row[:, None]
            if SWAPPED:
                acc += part * code_scale(of_column)[:, None]
            else:
                acc += part * code_scale(of_column)[None, :]
            if AHEAD:
                factor = next_factor
        else:
            acc = part
    acc = of_sums(acc.T if SWAPPED else acc, ELEMENTS, dtype)
    return _with_scales_of_all(
        acc, scale_of_column, a_scale, a_mask, input_scale, SCALE_TERMS >= TERMS, INPUTS
    )


@triton.jit
def _with_scales_of_all(
    acc, scale_of_column, a_scale, a_mask, input_scale, ONE: tl.constexpr, INPUTS: tl.constexpr
):  # fmt: skip
    """Apply to complete sums the scales that span all their terms; of columns there may be ONE."""
    if ONE:
        if INPUTS == "group":
            acc *= tl.load(a_scale, mask=a_mask, other=0.0)[:, None]
        acc *= code_scale(tl.load(scale_of_column))[None, :]
    if INPUTS == "token":
        acc *= tl.load(a_scale, mask=a_mask, other=0.0)[:, None]
    if INPUTS == "static":
        acc *= input_scale
    return acc


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["row_of_E"])
def quantised_gate_up_kernel(
    x, x_stride, x_scale, x_scale_stride,
    codes, code_row, code_stride, zero, zero_row, zero_stride, scale, scale_row, scale_stride,
    parts, parts_row, input_scale, input_row, bias, bias_row,
    h_PI, weight, sorted_pair, expert_of_block, num_blocks_ptr, row_of_E, num_pairs,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, CHOICES: tl.constexpr, WEIGH: tl.constexpr,
    NAME: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    SITU_BETA: tl.constexpr, SITU_LINEAR_BETA: tl.constexpr,
    ELEMENTS: tl.constexpr, ZERO: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_TERMS: tl.constexpr, PART_ROWS: tl.constexpr, INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``h_PI[t K + k] = act(w13[row] @ x[t] + b13[row])``; the sum is rounded before ``act``."""
    COLUMNS: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    program, num_blocks = tl.program_id(0), tl.load(num_blocks_ptr)
    if GROUP_M == 1:
        # Read whether there is such a block or not: volatile, or it would wait to be known.
        block, tile_n = program // TILES_N, program % TILES_N
        expert = tl.load(expert_of_block + block, volatile=True)
    if program >= num_blocks * TILES_N:
        return
    if GROUP_M > 1:
        block, tile_n = _tile_of(program, num_blocks, TILES_N, GROUP_M)
        expert = tl.load(expert_of_block + block)
    row = tl.load(row_of_E + expert).to(tl.int64)
    if row < 0:
        return
    pair = tl.load(sorted_pair + block * BLOCK_M + tl.arange(0, BLOCK_M))
    real = pair < num_pairs

    # Columns past the last wrap around: their results are not stored.
    column = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) % COLUMNS
    if GATED and not INTERLEAVED:
        # A tile takes gate and up in turn, so that both of a value meet in one thread.
        column = column % 2 * INTERMEDIATE + column // 2
    token = (pair // CHOICES).to(tl.int64)
    if x_scale is not None:
        x_scale += token * x_scale_stride
    if zero is not None:
        zero += row * zero_row
    if input_scale is not None:
        input_scale = tl.load(input_scale + row * input_row)
    acc = _product(
        x + token * x_stride, real, x_scale, input_scale, codes + row * code_row, code_stride,
        zero, zero_stride, scale + row * scale_row, scale_stride, column,
        ELEMENTS, ZERO, SCALE_ROWS, SCALE_TERMS, INPUTS, HIDDEN, BLOCK_K,
        h_PI.dtype.element_ty, SWAPPED, UPCAST,
    )  # fmt: skip
    if parts is not None:
        acc *= tl.load(parts + row * parts_row + column // PART_ROWS)[None, :]
    if WEIGH:
        acc *= tl.load(weight + pair, mask=real, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        acc += tl.load(bias + row * bias_row + column).to(tl.float32)[None, :]
    acc = acc.to(h_PI.dtype.element_ty).to(tl.float32)
    h = activate(acc, NAME, GATED, LIMIT, ALPHA, BETA, SITU_BETA, SITU_LINEAR_BETA)

    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    i = tile_n * WIDTH + tl.arange(0, WIDTH)
    h_ptrs = h_PI + pair.to(tl.int64)[:, None] * INTERMEDIATE + i[None, :]
    tl.store(h_ptrs, h.to(h_PI.dtype.element_ty), mask=real[:, None] & (i < INTERMEDIATE)[None, :])


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["row_of_E"])
def quantised_down_kernel(
    h_PI, h_stride, h_scale, h_scale_stride,
    codes, code_row, code_stride, zero, zero_row, zero_stride, scale, scale_row, scale_stride,
    parts, parts_row, input_scale, input_row, bias, bias_row,
    out, out_stride, weight, sorted_pair, expert_of_block, num_blocks_ptr, row_of_E, num_pairs,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, WEIGH: tl.constexpr,
    ELEMENTS: tl.constexpr, ZERO: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_TERMS: tl.constexpr, INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SWAPPED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``out[t K + k] = weight[t K + k] * (w2[row] @ h_PI[t K + k] + b2[row])``."""
    TILES_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    program, num_blocks = tl.program_id(0), tl.load(num_blocks_ptr)
    if GROUP_M == 1:
        # Read whether there is such a block or not: volatile, or it would wait to be known.
        block, tile_n = program // TILES_N, program % TILES_N
        expert = tl.load(expert_of_block + block, volatile=True)
    if program >= num_blocks * TILES_N:
        return
    if GROUP_M > 1:
        block, tile_n = _tile_of(program, num_blocks, TILES_N, GROUP_M)
        expert = tl.load(expert_of_block + block)
    row = tl.load(row_of_E + expert).to(tl.int64)
    if row < 0:
        return
    pair = tl.load(sorted_pair + block * BLOCK_M + tl.arange(0, BLOCK_M))
    real = pair < num_pairs

    h = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = h % HIDDEN
    place = pair.to(tl.int64)
    if h_scale is not None:
        h_scale += place * h_scale_stride
    if zero is not None:
        zero += row * zero_row
    if input_scale is not None:
        input_scale = tl.load(input_scale + row * input_row)
    acc = _product(
        h_PI + place * h_stride, real, h_scale, input_scale, codes + row * code_row,
        code_stride, zero, zero_stride, scale + row * scale_row, scale_stride, column,
        ELEMENTS, ZERO, SCALE_ROWS, SCALE_TERMS, INPUTS, INTERMEDIATE, BLOCK_K,
        out.dtype.element_ty, SWAPPED, UPCAST,
    )  # fmt: skip
    if parts is not None:
        acc *= tl.load(parts + row * parts_row)
    if bias is not None:
        acc += tl.load(bias + row * bias_row + column).to(tl.float32)[None, :]
    if WEIGH:
        acc *= tl.load(weight + pair, mask=real, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out + place[:, None] * out_stride + h[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=real[:, None] & (h < HIDDEN)[None, :])
