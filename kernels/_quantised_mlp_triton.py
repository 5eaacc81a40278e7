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
from vllm_moe_offload.kernels._expert_mlp_triton import _tile_of

_E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def _to_e4m3(x, ROUND: tl.constexpr):
    """Round float32 to e4m3, to nearest and ties to even."""
    x = tl.minimum(tl.maximum(x, -_E4M3_MAX, tl.PropagateNan.ALL), _E4M3_MAX, tl.PropagateNan.ALL)
    if ROUND:
        # Triton's interpreter cuts off instead. Three bits of mantissa stay; below 2^-6 the
        # steps are of 2^-9, where adding 1.5 2^14 lets float32 round.
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        small = (x + 24576.0) - 24576.0
        x = tl.where(tl.abs(x) < 0.015625, small, kept.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit
def quantise_rows_kernel(
    x, x_stride, q, scale, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    LEAST: tl.constexpr, OF_MAXIMUM: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Give every GROUP values of a row their scale; one program a row and group."""
    row = tl.program_id(0).to(tl.int64)
    _quantise(
        x + row * x_stride, q + row * WIDTH, scale + row * tl.num_programs(1), tl.program_id(1),
        WIDTH, GROUP, BLOCK, LEAST, OF_MAXIMUM, ROUND,
    )  # fmt: skip


@triton.jit
def quantise_pairs_kernel(
    x, q, scale, sorted_pair, expert_of_block, num_blocks, row_of_E, num_pairs,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LEAST: tl.constexpr,
    OF_MAXIMUM: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Do the same with the rows of the pairs that have just been computed."""
    place = tl.program_id(0)
    if place >= tl.load(num_blocks) * BLOCK_M:
        return
    if tl.load(row_of_E + tl.load(expert_of_block + place // BLOCK_M)) < 0:
        return
    pair = tl.load(sorted_pair + place).to(tl.int64)
    if pair >= num_pairs:
        return
    _quantise(
        x + pair * WIDTH, q + pair * WIDTH, scale + pair * tl.num_programs(1), tl.program_id(1),
        WIDTH, GROUP, BLOCK, LEAST, OF_MAXIMUM, ROUND,
    )  # fmt: skip


@triton.jit
def _quantise(
    x, q, scale, group, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    LEAST: tl.constexpr, OF_MAXIMUM: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    offset = tl.arange(0, BLOCK)
    column = group * GROUP + offset
    inside = (offset < GROUP) & (column < WIDTH)
    values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values))
    if OF_MAXIMUM:
        factor = tl.maximum(largest, LEAST) * (1.0 / _E4M3_MAX)
    else:
        factor = tl.maximum(largest * (1.0 / _E4M3_MAX), LEAST)
    tl.store(scale + group, factor)
    tl.store(q + column, _to_e4m3(tl.div_rn(values, factor), ROUND), mask=inside)


@triton.jit
def _code_scale(raw):
    """Turn stored scales into float32; bytes are powers of two (E8M0)."""
    if raw.dtype == tl.uint8:
        exponent = raw.to(tl.uint32)
        # 2^-127 is below the normal range, and 255 stands for NaN.
        bits = tl.where(exponent == 0, 0x400000, exponent << 23)
        bits = tl.where(exponent == 255, 0x7FC00000, bits)
        scale = bits.to(tl.float32, bitcast=True)
    else:
        scale = raw.to(tl.float32)
    return scale


@triton.jit
def _e2m1(code, dtype: tl.constexpr):
    """Decode 4-bit floats: sign, two bits of exponent with bias 1, one bit of mantissa."""
    MANTISSA: tl.constexpr = dtype.fp_mantissa_width
    WIDTH: tl.constexpr = dtype.primitive_bitwidth
    HALF: tl.constexpr = (dtype.exponent_bias - 1) << MANTISSA
    word: tl.constexpr = tl.uint32 if WIDTH == 32 else tl.uint16
    code = code.to(word)
    magnitude = code & 7
    # 0.5 is the only value below the normal range.
    bits = tl.where(magnitude > 1, (magnitude << (MANTISSA - 1)) + HALF, magnitude * HALF)
    return (bits | ((code & 8) << (WIDTH - 4))).to(dtype, bitcast=True)


@triton.jit
def _e4m3(code):
    """Decode 8-bit floats of weights to float32 on machines that have none."""
    code = code.to(tl.uint32)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _tile(
    codes, code_stride, zero, zero_stride, scale, scale_stride, column, first,
    ELEMENTS: tl.constexpr, ZERO: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_TERMS: tl.constexpr, TERMS: tl.constexpr, BLOCK_K: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Decode BLOCK_N columns and BLOCK_K terms to ``dtype``, with scales finer than BLOCK_K."""
    BLOCK_N: tl.constexpr = column.shape[0]
    MASKED: tl.constexpr = TERMS % BLOCK_K != 0
    PACKED: tl.constexpr = 1 if ELEMENTS == "uint8" or ELEMENTS == "e4m3" else 2  # noqa: PLR1714
    byte = first // PACKED + tl.arange(0, BLOCK_K // PACKED)
    pointers = codes + (column * code_stride)[:, None] + byte[None, :]
    if MASKED:
        raw = tl.load(pointers, mask=(byte < TERMS // PACKED)[None, :], other=0)
    else:
        raw = tl.load(pointers)
    if PACKED == 2:
        raw = tl.join(raw & 0xF, raw >> 4).reshape(BLOCK_N, BLOCK_K)
    FINE: tl.constexpr = SCALE_TERMS < BLOCK_K
    GROUPS: tl.constexpr = BLOCK_K // SCALE_TERMS if FINE else 1
    group = first // SCALE_TERMS + tl.arange(0, GROUPS)
    if ELEMENTS == "e2m1":
        values = _e2m1(raw, dtype)
    elif ELEMENTS == "e4m3":
        values = _e4m3(raw)
    elif zero is None:
        values = (raw.to(tl.int32) - ZERO).to(dtype)
    else:
        # Zero points of neighbouring columns share a byte.
        at = zero + (column // PACKED * zero_stride)[:, None] + group[None, :]
        points = tl.load(at, mask=(group * SCALE_TERMS < TERMS)[None, :], other=0).to(tl.int32)
        if PACKED == 2:
            points = (points >> (column % 2 * 4)[:, None]) & 0xF
        points = tl.broadcast_to(points[:, :, None], (BLOCK_N, GROUPS, BLOCK_K // GROUPS))
        values = (raw.to(tl.int32) - points.reshape(BLOCK_N, BLOCK_K)).to(dtype)
    if FINE:
        at = scale + (column // SCALE_ROWS * scale_stride)[:, None] + group[None, :]
        EMPTY: tl.constexpr = 0 if scale.dtype.element_ty == tl.uint8 else 0.0
        inside = (group * SCALE_TERMS < TERMS)[None, :]
        factors = _code_scale(tl.load(at, mask=inside, other=EMPTY))
        factors = tl.broadcast_to(factors[:, :, None], (BLOCK_N, GROUPS, BLOCK_K // GROUPS))
        values = values.to(tl.float32) * factors.reshape(BLOCK_N, BLOCK_K)
    return tl.trans(values.to(dtype))


@triton.jit
def _product(  # noqa: PLR0912
    a_rows, a_mask, a_scale, input_scale, codes, code_stride, zero, zero_stride,
    scale, scale_stride, column,
    ELEMENTS: tl.constexpr, ZERO: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_TERMS: tl.constexpr, INPUTS: tl.constexpr, TERMS: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Multiply BLOCK_M rows by BLOCK_N columns over TERMS terms, summed in float32.

    Scales that span at least BLOCK_K terms are applied to sums, others to the decoded tile.
    """
    acc = tl.zeros([a_rows.shape[0], column.shape[0]], tl.float32)
    term = tl.arange(0, BLOCK_K)
    MASKED: tl.constexpr = TERMS % BLOCK_K != 0
    ROUNDED: tl.constexpr = INPUTS != "none"
    # Interpreted, a product is in float32: it knows neither bfloat16 nor e4m3.
    native: tl.constexpr = tl.float8e4nv if ROUNDED else a_rows.dtype.element_ty
    dtype: tl.constexpr = tl.float32 if UPCAST else native
    scale_of_column = scale + column // SCALE_ROWS * scale_stride
    for first in range(0, TERMS, BLOCK_K):
        a_ptrs = a_rows[:, None] + (first + term)[None, :]
        if MASKED:
            inside = first + term < TERMS
            a = tl.load(a_ptrs, mask=a_mask[:, None] & inside[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=a_mask[:, None], other=0.0)
        if INPUTS == "static":
            a = _to_e4m3(a.to(tl.float32) * (1.0 / input_scale), UPCAST)
        if ROUNDED:
            b_ptrs = codes + column[None, :] * code_stride + (first + term)[:, None]
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0) if MASKED else tl.load(b_ptrs)
        else:
            b = _tile(
                codes, code_stride, zero, zero_stride, scale, scale_stride, column, first,
                ELEMENTS, ZERO, SCALE_ROWS, SCALE_TERMS, TERMS, BLOCK_K, dtype,
            )  # fmt: skip
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        if SCALE_TERMS >= BLOCK_K and SCALE_TERMS < TERMS:
            part = tl.dot(a, b, input_precision="ieee")
            if INPUTS == "group":
                part *= tl.load(a_scale + first // SCALE_TERMS, mask=a_mask, other=0.0)[:, None]
            acc += part * _code_scale(tl.load(scale_of_column + first // SCALE_TERMS))[None, :]
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
    if SCALE_TERMS >= TERMS:
        if INPUTS == "group":
            acc *= tl.load(a_scale, mask=a_mask, other=0.0)[:, None]
        acc *= _code_scale(tl.load(scale_of_column))[None, :]
    if INPUTS == "token":
        acc *= tl.load(a_scale, mask=a_mask, other=0.0)[:, None]
    if INPUTS == "static":
        acc *= input_scale
    return acc


@triton.jit
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
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``h_PI[t K + k] = act(w13[row] @ x[t] + b13[row])``; the sum is rounded before ``act``."""
    COLUMNS: tl.constexpr = 2 * INTERMEDIATE if GATED else INTERMEDIATE
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    program, num_blocks = tl.program_id(0), tl.load(num_blocks_ptr)
    if program >= num_blocks * TILES_N:
        return
    block, tile_n = _tile_of(program, num_blocks, TILES_N, GROUP_M)
    row = tl.load(row_of_E + tl.load(expert_of_block + block)).to(tl.int64)
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
        ELEMENTS, ZERO, SCALE_ROWS, SCALE_TERMS, INPUTS, HIDDEN, BLOCK_K, UPCAST,
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


@triton.jit
def quantised_down_kernel(
    h_PI, h_scale, h_scale_stride,
    codes, code_row, code_stride, zero, zero_row, zero_stride, scale, scale_row, scale_stride,
    parts, parts_row, input_scale, input_row, bias, bias_row,
    out, out_stride, weight, sorted_pair, expert_of_block, num_blocks_ptr, row_of_E, num_pairs,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, WEIGH: tl.constexpr,
    ELEMENTS: tl.constexpr, ZERO: tl.constexpr, SCALE_ROWS: tl.constexpr,
    SCALE_TERMS: tl.constexpr, INPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``out[t K + k] = weight[t K + k] * (w2[row] @ h_PI[t K + k] + b2[row])``."""
    TILES_N: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    program, num_blocks = tl.program_id(0), tl.load(num_blocks_ptr)
    if program >= num_blocks * TILES_N:
        return
    block, tile_n = _tile_of(program, num_blocks, TILES_N, GROUP_M)
    row = tl.load(row_of_E + tl.load(expert_of_block + block)).to(tl.int64)
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
        h_PI + place * INTERMEDIATE, real, h_scale, input_scale, codes + row * code_row,
        code_stride, zero, zero_stride, scale + row * scale_row, scale_stride, column,
        ELEMENTS, ZERO, SCALE_ROWS, SCALE_TERMS, INPUTS, INTERMEDIATE, BLOCK_K, UPCAST,
    )  # fmt: skip
    if parts is not None:
        acc *= tl.load(parts + row * parts_row)
    if bias is not None:
        acc += tl.load(bias + row * bias_row + column).to(tl.float32)[None, :]
    if WEIGH:
        acc *= tl.load(weight + pair, mask=real, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out + place[:, None] * out_stride + h[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=real[:, None] & (h < HIDDEN)[None, :])
