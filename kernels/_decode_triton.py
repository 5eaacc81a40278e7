# mypy: ignore-errors
"""What codes and scales mean, on tiles in registers.

Of two 4-bit codes in a byte the lower bits are the even term and the higher bits the odd one. They
are never brought side by side: a product takes all even terms, then all odd ones. On a GPU four
bytes at a time are decoded to 16-bit values, two in a register, by bit operations in PTX, because
the compiler would take every value apart. With APART a register takes its two codes from bytes that
are two apart, where one mask finds both: of bytes 0 1 2 3 come values 0 2 1 3. The activations have
to be in that order too, see ``in_order_of_codes``.

Legend: K terms, N columns, G groups of terms with one scale.
"""

from collections.abc import Callable

import triton
import triton.language as tl


@triton.jit
def code_scale(raw):
    """Turn stored scales into float32; bytes are powers of two (E8M0), signed ones are e4m3."""
    if raw.dtype == tl.uint8:
        exponent = raw.to(tl.uint32)
        # 2^-127 is below the normal range, and 255 stands for NaN.
        bits = tl.where(exponent == 0, 0x400000, exponent << 23)
        bits = tl.where(exponent == 255, 0x7FC00000, bits)
        scale = bits.to(tl.float32, bitcast=True)
    elif raw.dtype == tl.int8:
        scale = e4m3(raw)
    else:
        scale = raw.to(tl.float32)
    return scale


_EXPONENTS = tl.constexpr(
    """{
    .reg .b32 t, u;
    prmt.b32 t, $2, 0, 0x4140;
    prmt.b32 u, $2, 0, 0x4342;
    mad.lo.u32 $0, t, 128, 0x2F002F00;
    mad.lo.u32 $1, u, 128, 0x2F002F00;
    }"""
)
"""PTX from four bytes, of at most 160, to 2^(byte - 33) of each: 94 is added and shifted by 7.

In PTX because the compiler brings bytes to the threads that need them, not what becomes of them:
every scale would be converted where it is used. Larger bytes give infinity or some number and leave
their neighbours alone, for sums stay below 2^16: to keep them within bounds would take two more
instructions, and serve no checkpoint.
"""


@triton.jit
def scale_as(raw, ELEMENTS: tl.constexpr, dtype: tl.constexpr):
    """Turn stored scales into what 4-bit codes are multiplied by in ``dtype``.

    For e2m1 in bfloat16 that is the scale times 2^94: the code is taken for its value times 2^-126,
    and ``of_sums`` gives the sums the rest. Bytes are moved as exponents: those of NaN and of more
    than 2^33, which no checkpoint is loaded with, become anything.
    """
    if ELEMENTS == "e2m1" and dtype == tl.bfloat16:
        if raw.dtype == tl.uint8:
            scale = tl.inline_asm_elementwise(
                _EXPONENTS, "=r,=r,r", [raw], dtype=tl.bfloat16, is_pure=True, pack=4
            )
        else:
            scale = (code_scale(raw) * 1.9807040628566084e28).to(dtype)
    else:
        scale = code_scale(raw).to(dtype)
    return scale


@triton.jit
def of_sums(acc, ELEMENTS: tl.constexpr, dtype: tl.constexpr):
    """Give sums what ``scale_as`` has left out."""
    if ELEMENTS == "e2m1" and dtype == tl.bfloat16:
        acc *= 4294967296.0  # 2^32
    return acc


@triton.jit
def e2m1(code):
    """Decode 4-bit floats to float32: sign, two bits of exponent with bias 1, one of mantissa."""
    code = code.to(tl.uint32)
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def e4m3(code):
    """Decode the bits of 8-bit floats to float32 on machines that have none."""
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


@triton.jit
def in_order_of_codes(terms_MK):
    """Bring activations, of even or of odd terms, into the order of ``nibbles``' 16-bit values."""
    M: tl.constexpr = terms_MK.shape[0]
    K: tl.constexpr = terms_MK.shape[1]
    return terms_MK.reshape(M, K // 4, 2, 2).permute(0, 1, 3, 2).reshape(M, K)


def _bytes(n: int, *, apart: bool, shift: int = 0) -> list[str]:
    """PTX that brings a register's two bytes, shifted to the right, to the ends of its halves."""
    if apart:
        return [f"shr.b32 t, $2, {shift + 8 * n}"]
    first = [f"shr.b32 w, $2, {shift}"] if n == 0 else []
    return [*first, f"prmt.b32 t, w, 0, 0x{('4140', '4342')[n]}"]


def _integers(of: str, *, odd: bool, scaled: bool, apart: bool) -> str:
    """PTX from four bytes to one integer of each, in two registers.

    The code becomes the lowest bits of the mantissa of 2^7 (bfloat16) or 2^10 (float16); the
    operand holds what is to be subtracted with it, negated. Both steps are exact, and the scale
    rounds once.
    """
    magic, one = {"bf16": ("43004300", "3F803F80"), "f16": ("64006400", "3C003C00")}[of]
    lines = [f"mov.b32 one, 0x{one}"]
    for n in (0, 1):
        lines += [
            *_bytes(n, apart=apart, shift=4 * odd),
            f"lop3.b32 t, t, 0x000F000F, 0x{magic}, 0xEA",  # a & b | c
            f"fma.rn.{of}x2 {'t' if scaled else f'${n}'}, t, one, ${n + 3}",
        ]
        if scaled:
            lines.append(f"fma.rn.{of}x2 ${n}, t, ${n + 5}, nought")
    return _block(lines)


def _floats(of: str, *, odd: bool, apart: bool) -> str:
    """PTX from four bytes to one e2m1 value of each times its scale, in two registers.

    Exponent and mantissa move to where they stand for the value times 2^-126 (bfloat16) or 2^-14
    (float16), which is right below the normal range too. In bfloat16 the scale and the sums
    multiply that back; the range of float16 has no room for it.
    """
    lines = [] if of == "bf16" else ["mov.b32 one, 0x74007400"]
    for n in (0, 1):
        lines += _bytes(n, apart=apart)
        if of == "bf16":
            # The product holds the code twice, its sign in bit 15 and the rest in bits 6 to 8.
            lines += [
                f"and.b32 t, t, 0x{'00F000F0' if odd else '000F000F'}",
                f"mul.lo.u32 t, t, 0x{0x104 if odd else 0x1040:X}",
                "and.b32 t, t, 0x81C081C0",
            ]
        else:
            lines += [
                f"shl.b32 u, t, {5 if odd else 9}",
                f"shl.b32 t, t, {8 if odd else 12}",
                "and.b32 u, u, 0x0E000E00",
                "lop3.b32 t, t, 0x80008000, u, 0xEA",  # a & b | c
                "fma.rn.f16x2 t, t, one, nought",
            ]
        lines.append(f"fma.rn.{of}x2 ${n}, t, ${n + 3}, nought")
    return _block(lines)


def _block(lines: list[str]) -> str:
    registers = ".reg .b32 w, t, u, one, nought"
    return "{ " + "; ".join([registers, "mov.b32 nought, 0x80008000", *lines]) + "; }"


def _forms(write: Callable[..., str], of: str, **options: bool) -> tl.constexpr:
    """PTX by whether codes are apart and whether they are the odd ones."""
    return tl.constexpr(
        [[write(of, odd=odd, apart=apart, **options) for odd in (False, True)]
         for apart in (False, True)]
    )  # fmt: skip


_INTEGERS_BF16 = _forms(_integers, "bf16", scaled=False)
_INTEGERS_F16 = _forms(_integers, "f16", scaled=False)
_SCALED_BF16 = _forms(_integers, "bf16", scaled=True)
_SCALED_F16 = _forms(_integers, "f16", scaled=True)
_FLOATS_BF16 = _forms(_floats, "bf16")
_FLOATS_F16 = _forms(_floats, "f16")


@triton.jit
def minus_zeros(points, dtype: tl.constexpr):
    """Prepare zero points for ``nibbles``."""
    # What stands above a code in the mantissa goes with its zero point.
    MAGIC: tl.constexpr = 0 if dtype == tl.float32 else 128 if dtype == tl.bfloat16 else 1024
    return (-MAGIC - points.to(tl.int32)).to(dtype)


@triton.jit
def nibbles(
    raw_KN, minus_KN, scale_KN, ELEMENTS: tl.constexpr, ODD: tl.constexpr, APART: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Decode one code of every byte to ``dtype``.

    Args:
        raw_KN: bytes.
        minus_KN: what ``minus_zeros`` makes of zero points, ignored for floats.
        scale_KN: what ``scale_as`` makes of scales; None if integers are scaled elsewhere.
        ELEMENTS: "uint4" or "e2m1".
        ODD: which of the two codes.
        APART: the order of 16-bit values.
        dtype: float32, by plain operations, or a 16-bit type.
    """
    BF16: tl.constexpr = dtype == tl.bfloat16
    if dtype == tl.float32:
        code = raw_KN >> 4 if ODD else raw_KN & 0xF
        values = e2m1(code) if ELEMENTS == "e2m1" else code.to(tl.float32) + minus_KN
        if scale_KN is not None:
            values *= scale_KN
    elif ELEMENTS == "e2m1":
        code: tl.constexpr = (_FLOATS_BF16 if BF16 else _FLOATS_F16)[APART][ODD]
        values = tl.inline_asm_elementwise(
            code, "=r,=r,r,r,r", [raw_KN, scale_KN], dtype=scale_KN.dtype, is_pure=True, pack=4
        )
    elif scale_KN is None:
        code: tl.constexpr = (_INTEGERS_BF16 if BF16 else _INTEGERS_F16)[APART][ODD]
        values = tl.inline_asm_elementwise(
            code, "=r,=r,r,r,r", [raw_KN, minus_KN], dtype=minus_KN.dtype, is_pure=True, pack=4
        )
    else:
        code: tl.constexpr = (_SCALED_BF16 if BF16 else _SCALED_F16)[APART][ODD]
        values = tl.inline_asm_elementwise(
            code, "=r,=r,r,r,r,r,r", [raw_KN, minus_KN, scale_KN],
            dtype=minus_KN.dtype, is_pure=True, pack=4,
        )  # fmt: skip
    return values
