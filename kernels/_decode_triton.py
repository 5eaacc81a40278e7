# mypy: ignore-errors
"""What codes and scales mean, on tiles in registers.

Of two 4-bit codes in a byte the lower bits are the even term and the higher bits the odd one. They
are never brought side by side: a product takes all even terms, then all odd ones. On a GPU four
bytes at a time are decoded to 16-bit values, two in a register, by bit operations in PTX, because
the compiler would take every value apart.

Legend: K terms, N columns, G groups of terms with one scale.
"""

import triton
import triton.language as tl


@triton.jit
def code_scale(raw):
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
def scale_as(raw, dtype: tl.constexpr):
    """Turn stored scales into the type that 4-bit codes are decoded to.

    In bfloat16 a byte is taken for an exponent as it is: 2^-127 counts as zero, and NaN, which no
    checkpoint is loaded with, as infinity.
    """
    if raw.dtype == tl.uint8 and dtype == tl.bfloat16:
        scale = (raw.to(tl.uint16) << 7).to(tl.bfloat16, bitcast=True)
    else:
        scale = code_scale(raw).to(dtype)
    return scale


@triton.jit
def e2m1(code):
    """Decode 4-bit floats to float32: sign, two bits of exponent with bias 1, one of mantissa."""
    code = code.to(tl.uint32)
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e4m3(code):
    """Decode 8-bit floats of weights to float32 on machines that have none."""
    code = code.to(tl.uint32)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def uint8(code):
    """Turn bytes into float32 through the mantissa of 2^23, which beats a conversion."""
    return (code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def over_terms(tile_GN, EACH: tl.constexpr):
    """Repeat [G, N] to [G EACH, N]."""
    GROUPS: tl.constexpr = tile_GN.shape[0]
    BLOCK_N: tl.constexpr = tile_GN.shape[1]
    wide = tl.broadcast_to(tile_GN[:, None, :], (GROUPS, EACH, BLOCK_N))
    return wide.reshape(GROUPS * EACH, BLOCK_N)


def _integers(of: str, *, odd: bool, scaled: bool) -> str:
    """PTX from four bytes to one integer of each, in two registers.

    The code becomes the lowest bits of the mantissa of 2^7 (bfloat16) or 2^10 (float16); the
    operand holds what is to be subtracted with it, negated. Both steps are exact, and the scale
    rounds once.
    """
    magic, one = {"bf16": ("43004300", "3F803F80"), "f16": ("64006400", "3C003C00")}[of]
    lines = ["shr.b32 w, $2, 4" if odd else "mov.b32 w, $2"]
    for n, order in enumerate(("4140", "4342")):
        lines += [
            f"prmt.b32 t, w, 0, 0x{order}",
            f"lop3.b32 t, t, 0x000F000F, 0x{magic}, 0xEA",  # a & b | c
            f"fma.rn.{of}x2 {'t' if scaled else f'${n}'}, t, one, ${n + 3}",
        ]
        if scaled:
            lines.append(f"fma.rn.{of}x2 ${n}, t, ${n + 5}, nought")
    return _block([f"mov.b32 one, 0x{one}", *lines])


def _floats(of: str, *, odd: bool) -> str:
    """PTX from four bytes to one e2m1 value of each times its scale, in two registers.

    Exponent and mantissa move to where they stand for the value times 2^-126 (bfloat16) or 2^-14
    (float16), which is right below the normal range too. Multiplying that back is exact.
    """
    factor = {"bf16": "7E807E80", "f16": "74007400"}[of]
    if odd:
        lines = ["and.b32 w, $2, 0xF0F0F0F0"]
    else:
        lines = ["and.b32 w, $2, 0x0F0F0F0F", "shl.b32 w, w, 4"]
    for n, order in enumerate(("1404", "3424")):
        lines.append(f"prmt.b32 t, w, 0, 0x{order}")
        if of == "bf16":
            # Of the shifted code only the sign has to go: there the other one holds zero.
            lines += ["shr.b32 u, t, 6", "lop3.b32 t, t, u, 0x82008200, 0xE4"]  # c ? a : b
        else:
            lines += ["shr.b32 u, t, 3", "and.b32 u, u, 0x0E000E00"]
            lines.append("lop3.b32 t, t, 0x80008000, u, 0xEA")
        lines += [
            f"fma.rn.{of}x2 t, t, factor, nought",
            f"fma.rn.{of}x2 ${n}, t, ${n + 3}, nought",
        ]
    return _block([f"mov.b32 factor, 0x{factor}", *lines])


def _block(lines: list[str]) -> str:
    registers = ".reg .b32 w, t, u, one, factor, nought"
    return "{ " + "; ".join([registers, "mov.b32 nought, 0x80008000", *lines]) + "; }"


_INTEGERS_BF16 = tl.constexpr([_integers("bf16", odd=odd, scaled=False) for odd in (False, True)])
_INTEGERS_F16 = tl.constexpr([_integers("f16", odd=odd, scaled=False) for odd in (False, True)])
_SCALED_BF16 = tl.constexpr([_integers("bf16", odd=odd, scaled=True) for odd in (False, True)])
_SCALED_F16 = tl.constexpr([_integers("f16", odd=odd, scaled=True) for odd in (False, True)])
_FLOATS_BF16 = tl.constexpr([_floats("bf16", odd=odd) for odd in (False, True)])
_FLOATS_F16 = tl.constexpr([_floats("f16", odd=odd) for odd in (False, True)])


@triton.jit
def minus_zeros(points, dtype: tl.constexpr):
    """Prepare zero points for ``nibbles``."""
    # What stands above a code in the mantissa goes with its zero point.
    MAGIC: tl.constexpr = 0 if dtype == tl.float32 else 128 if dtype == tl.bfloat16 else 1024
    return (-MAGIC - points.to(tl.int32)).to(dtype)


@triton.jit
def nibbles(
    raw_KN, minus_KN, scale_KN, ELEMENTS: tl.constexpr, ODD: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Decode one code of every byte to ``dtype``.

    Args:
        raw_KN: bytes.
        minus_KN: what ``minus_zeros`` makes of zero points, ignored for floats.
        scale_KN: scales in ``dtype``; None if integers are scaled elsewhere.
        ELEMENTS: "uint4" or "e2m1".
        ODD: which of the two codes.
        dtype: float32, by plain operations, or a 16-bit type.
    """
    BF16: tl.constexpr = dtype == tl.bfloat16
    if dtype == tl.float32:
        code = raw_KN >> 4 if ODD else raw_KN & 0xF
        values = e2m1(code) if ELEMENTS == "e2m1" else code.to(tl.float32) + minus_KN
        if scale_KN is not None:
            values *= scale_KN
    elif ELEMENTS == "e2m1":
        code: tl.constexpr = (_FLOATS_BF16 if BF16 else _FLOATS_F16)[ODD]
        values = tl.inline_asm_elementwise(
            code, "=r,=r,r,r,r", [raw_KN, scale_KN], dtype=scale_KN.dtype, is_pure=True, pack=4
        )
    elif scale_KN is None:
        code: tl.constexpr = (_INTEGERS_BF16 if BF16 else _INTEGERS_F16)[ODD]
        values = tl.inline_asm_elementwise(
            code, "=r,=r,r,r,r", [raw_KN, minus_KN], dtype=minus_KN.dtype, is_pure=True, pack=4
        )
    else:
        code: tl.constexpr = (_SCALED_BF16 if BF16 else _SCALED_F16)[ODD]
        values = tl.inline_asm_elementwise(
            code, "=r,=r,r,r,r,r,r", [raw_KN, minus_KN, scale_KN],
            dtype=minus_KN.dtype, is_pure=True, pack=4,
        )  # fmt: skip
    return values
