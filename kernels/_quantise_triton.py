# mypy: ignore-errors
"""Triton bodies that round activations to e4m3.

Legend: P pairs (T K), G groups of terms with one scale. BLOCK_M pairs of a block.
"""

import triton
import triton.language as tl

from vllm_moe_offload.kernels import formats

_E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
_SMALLEST_MAXIMUM = tl.constexpr(formats.SMALLEST_GROUP_MAXIMUM)
_SMALLEST_SCALE = tl.constexpr(formats.SMALLEST_TOKEN_SCALE)


@triton.jit
def to_e4m3(x, ROUND: tl.constexpr):
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
def group_factor(largest):
    """Scale of a group whose largest magnitude is known."""
    return tl.maximum(largest, _SMALLEST_MAXIMUM) * (1.0 / _E4M3_MAX)


@triton.jit
def quotient(values, factor, INTERPRETED: tl.constexpr):
    """Divide and round to nearest.

    With a rounded reciprocal one step of correction is exact (Markstein 1990), where nothing
    underflows; what underflows here is zero in e4m3.
    """
    if INTERPRETED:  # knows no fused operation
        result = tl.div_rn(values, factor)
    else:
        reciprocal = tl.div_rn(1.0, factor)
        near = values * reciprocal
        result = tl.fma(tl.fma(-near, factor, values), reciprocal, near)
    return result


@triton.jit(do_not_specialize=["num_rows"])
def quantise_rows_kernel(
    x, x_stride, q, scale, num_rows, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, OF_MAXIMUM: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Give every GROUP values of a row their scale; one program for ROWS rows and a group."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    _quantise(
        x + row * x_stride, q + row * WIDTH, scale + row * tl.num_programs(1), row < num_rows,
        WIDTH, GROUP, BLOCK, OF_MAXIMUM, ROUND,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs"], do_not_specialize_on_alignment=["row_of_E"])
def quantise_pairs_kernel(
    x, q, scale, sorted_pair, expert_of_block, num_blocks, row_of_E, num_pairs,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    OF_MAXIMUM: tl.constexpr, ROUND: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Do the same with the rows of the pairs that have just been computed."""
    first = tl.program_id(0) * ROWS
    if first >= tl.load(num_blocks) * BLOCK_M:
        return
    if tl.load(row_of_E + tl.load(expert_of_block + first // BLOCK_M)) < 0:
        return
    pair = tl.load(sorted_pair + first + tl.arange(0, ROWS)).to(tl.int64)
    _quantise(
        x + pair * WIDTH, q + pair * WIDTH, scale + pair * tl.num_programs(1), pair < num_pairs,
        WIDTH, GROUP, BLOCK, OF_MAXIMUM, ROUND,
    )  # fmt: skip


@triton.jit
def _quantise(
    x, q, scale, real, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    OF_MAXIMUM: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Round a group of the rows that start at ``x``, where they are ``real``."""
    offset, group = tl.arange(0, BLOCK), tl.program_id(1)
    column = group * GROUP + offset
    inside = real[:, None] & ((offset < GROUP) & (column < WIDTH))[None, :]
    values = tl.load(x[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    if OF_MAXIMUM:
        factor = group_factor(largest)
    else:
        factor = tl.maximum(largest * (1.0 / _E4M3_MAX), _SMALLEST_SCALE)
    tl.store(scale + group, factor, mask=real)
    rounded = to_e4m3(quotient(values, factor[:, None], ROUND), ROUND)
    tl.store(q[:, None] + column[None, :], rounded, mask=inside)
