# mypy: ignore-errors
"""Triton bodies of ``expert_mlp`` and ``combine``.

Legend: T tokens, K choices a token, P pairs (T K), S rows of experts, H hidden size,
I intermediate size, N columns of the first product. BLOCK_M pairs, BLOCK_N columns and BLOCK_K
terms of a tile. What a tile computes depends on its expert's weights and its pairs only.
"""

import triton
import triton.language as tl

from vllm_moe_offload.kernels._activation_triton import activate


@triton.jit
def _tile_of(program, num_blocks, TILES_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Walk GROUP_M blocks through all columns before the next group, for the cache's sake."""
    group: tl.constexpr = GROUP_M * TILES_N
    first = program // group * GROUP_M
    size = tl.minimum(num_blocks - first, GROUP_M)
    return first + program % group % size, program % group // size


@triton.jit
def _product(
    a_rows, a_mask, b_rows,
    TERMS: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Multiply BLOCK_M rows by BLOCK_N rows over TERMS terms, summed in float32."""
    acc = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    term = tl.arange(0, BLOCK_K)
    for first in range(0, TERMS, BLOCK_K):
        a_ptrs = a_rows[:, None] + (first + term)[None, :]
        b_ptrs = b_rows[None, :] + (first + term)[:, None]
        if TERMS % BLOCK_K == 0:
            a = tl.load(a_ptrs, mask=a_mask[:, None], other=0.0)
            b = tl.load(b_ptrs)
        else:
            # Both are masked: what lies beyond a row may be NaN, which times zero is NaN.
            inside = first + term < TERMS
            a = tl.load(a_ptrs, mask=a_mask[:, None] & inside[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=inside[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["row_of_E"])
def gate_up_kernel(
    x, x_stride, w13, w13_row_stride, w13_stride, b13, b13_row_stride, h_PI, weight,
    sorted_pair, expert_of_block, num_blocks_ptr, row_of_E, num_pairs,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, CHOICES: tl.constexpr, WEIGH: tl.constexpr,
    NAME: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    SITU_BETA: tl.constexpr, SITU_LINEAR_BETA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``h_PI[t K + k] = act(w13[row] @ x[t] + b13[row])``."""
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
    acc = _product(
        x + (pair // CHOICES).to(tl.int64) * x_stride, real, w13 + row * w13_row_stride
        + column * w13_stride, HIDDEN, BLOCK_K, UPCAST,
    )  # fmt: skip
    if WEIGH:
        # Before the bias, so the same as weighing the input.
        acc *= tl.load(weight + pair, mask=real, other=0.0).to(tl.float32)[:, None]
    if b13 is not None:
        acc += tl.load(b13 + row * b13_row_stride + column).to(tl.float32)[None, :]
    h = activate(acc, NAME, GATED, LIMIT, ALPHA, BETA, SITU_BETA, SITU_LINEAR_BETA)

    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    i = tile_n * WIDTH + tl.arange(0, WIDTH)
    h_ptrs = h_PI + pair.to(tl.int64)[:, None] * INTERMEDIATE + i[None, :]
    tl.store(h_ptrs, h.to(h_PI.dtype.element_ty), mask=real[:, None] & (i < INTERMEDIATE)[None, :])


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["row_of_E"])
def down_kernel(
    h_PI, w2, w2_row_stride, w2_stride, b2, b2_row_stride, out, out_stride, weight,
    sorted_pair, expert_of_block, num_blocks_ptr, row_of_E, num_pairs,
    HIDDEN: tl.constexpr, INTERMEDIATE: tl.constexpr, WEIGH: tl.constexpr,
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
    acc = _product(
        h_PI + pair.to(tl.int64) * INTERMEDIATE, real, w2 + row * w2_row_stride
        + column * w2_stride, INTERMEDIATE, BLOCK_K, UPCAST,
    )  # fmt: skip
    if b2 is not None:
        acc += tl.load(b2 + row * b2_row_stride + column).to(tl.float32)[None, :]
    if WEIGH:
        acc *= tl.load(weight + pair, mask=real, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out + pair.to(tl.int64)[:, None] * out_stride + h[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=real[:, None] & (h < HIDDEN)[None, :])


@triton.jit
def combine_kernel(
    rows, row_stride, ids, y, y_stride,
    HIDDEN: tl.constexpr, CHOICES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``y[t] = sum of rows[t, k] over active k``, in choice order."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(CHOICES):
        active = tl.load(ids + token * CHOICES + k) >= 0
        row_ptrs = rows + (token * CHOICES + k) * row_stride + h
        total += tl.load(row_ptrs, mask=(h < HIDDEN) & active, other=0.0).to(tl.float32)
    tl.store(y + token * y_stride + h, total.to(y.dtype.element_ty), mask=h < HIDDEN)
