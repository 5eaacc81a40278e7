"""The PTX that decodes 4-bit codes, run instruction by instruction as PTX defines them.

The interpreter knows no inline assembly, so that the products in ``test_quantised_mlp`` run these
instructions on a GPU alone.
"""

import struct

import pytest
import torch

from vllm_moe_offload.kernels._decode_triton import _EXPONENTS, _floats, _integers

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
MAGIC = {"bf16": 128, "f16": 1024}


def permute(a: int, b: int, selector: int) -> int:
    source = struct.pack("<II", a, b)
    picked = [source[selector >> 4 * n & 7] for n in range(4)]
    assert not any(selector >> 4 * n & 8 for n in range(4)), "replicates signs"
    return int.from_bytes(bytes(picked), "little")


def bitwise(a: int, b: int, c: int, table: int) -> int:
    places = ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1 for n in range(32))
    return sum((table >> place & 1) << n for n, place in enumerate(places))


def halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    signed = [half - (half >> 15 << 16) for half in (word & 0xFFFF, word >> 16)]
    return torch.tensor(signed, dtype=torch.int16).view(dtype).double()


def fused(a: int, b: int, c: int, dtype: torch.dtype) -> int:
    # A product of 11-bit mantissas and a sum of such fit float64, so that one rounding is left.
    exact = halves(a, dtype) * halves(b, dtype) + halves(c, dtype)
    low, high = (int(half) & 0xFFFF for half in exact.to(dtype).view(torch.int16))
    return low | high << 16


def executed(operation: str, a: int, *others: int) -> int:
    kind, _, rest = operation.partition(".")
    if kind == "fma":
        return fused(a, *others, DTYPES[rest.removeprefix("rn.").removesuffix("x2")])
    return {
        "mov": lambda: a,
        "and": lambda: a & others[0],
        "shl": lambda: a << others[0] & 0xFFFFFFFF,
        "shr": lambda: a >> others[0],
        "prmt": lambda: permute(a, *others),
        "lop3": lambda: bitwise(a, *others),
        "mul": lambda: a * others[0] & 0xFFFFFFFF,
        "mad": lambda: (a * others[0] + others[1]) & 0xFFFFFFFF,
    }[kind]()


def run(assembly: str, *inputs: int) -> list[int]:
    registers = {f"${n + 2}": value for n, value in enumerate(inputs)}
    for line in assembly.strip("{ \n}").split(";"):
        operation, _, rest = line.strip().partition(" ")
        if not operation or operation == ".reg":
            continue
        target, *operands = rest.replace(" ", "").split(",")
        values = [registers[o] if o in registers else int(o, 0) for o in operands]
        registers[target] = executed(operation, *values)
    return [registers["$0"], registers["$1"]]


def twice(value: float, dtype: torch.dtype) -> int:
    (half,) = torch.tensor([value]).to(dtype).view(torch.int16).tolist()
    return (half & 0xFFFF) * 0x10001


def decoded(assembly: str, dtype: torch.dtype, *operands: int) -> torch.Tensor:
    """All bytes through the assembly, four at a time."""
    words = [int.from_bytes(bytes(range(first, first + 4)), "little") for first in range(0, 256, 4)]
    values = [halves(half, dtype) for word in words for half in run(assembly, word, *operands)]
    return torch.cat(values)


def codes(odd: bool, apart: bool) -> torch.Tensor:
    byte = torch.arange(256)
    if apart:
        byte = byte.view(-1, 2, 2).transpose(1, 2).flatten()  # see in_order_of_codes
    return byte >> 4 if odd else byte & 15


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("of", DTYPES)
def test_integers(of, odd, apart):
    dtype, zero = DTYPES[of], 7
    minus = twice(-MAGIC[of] - zero, dtype)
    values = decoded(_integers(of, odd=odd, scaled=False, apart=apart), dtype, minus, minus)
    assert torch.equal(values, (codes(odd, apart) - zero).double())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("of", DTYPES)
def test_scaled_integers_round_once(of, odd, apart):
    dtype, zero, scale = DTYPES[of], 8, torch.tensor(0.0137).to(DTYPES[of])
    operands = twice(-MAGIC[of] - zero, dtype), twice(float(scale), dtype)
    doubled = [operand for operand in operands for _ in range(2)]
    values = decoded(_integers(of, odd=odd, scaled=True, apart=apart), dtype, *doubled)
    expected = (codes(odd, apart) - zero).double() * scale.double()
    assert torch.equal(values, expected.to(dtype).double())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("exponent", [-12, 0, 5])
@pytest.mark.parametrize("of", DTYPES)
def test_4_bit_floats(of, exponent, odd, apart):
    dtype = DTYPES[of]
    # Sums are multiplied by 2^32 after scales times 2^94.
    left_out = 2.0**32 if of == "bf16" else 1.0
    scale = twice(2.0 ** (exponent + 94 if of == "bf16" else exponent), dtype)
    values = decoded(_floats(of, odd=odd, apart=apart), dtype, scale, scale) * left_out
    expected = torch.tensor(E2M1, dtype=torch.float64)[codes(odd, apart)] * 2.0**exponent
    assert torch.equal(values, expected)


def test_scales_of_4_bit_floats():
    """The range is that of bfloat16 less 2^32 at its lower end, and ends at 2^33."""
    scales = decoded(_EXPONENTS.value, torch.bfloat16)[:161]
    assert torch.equal(scales, torch.exp2((torch.arange(161) - 127 + 94).double()))
    for exponent in (-92, 0, 33):
        scale = twice(2.0 ** (exponent + 94), torch.bfloat16)
        values = (
            decoded(_floats("bf16", odd=False, apart=True), torch.bfloat16, scale, scale) * 2.0**32
        )
        assert sorted(set(values.tolist())) == sorted({v * 2.0**exponent for v in E2M1})


@pytest.mark.parametrize("byte", [161, 162, 254, 255])
def test_scales_that_no_checkpoint_holds_leave_their_neighbours_alone(byte):
    """Made-up weights may hold any bytes."""
    for place in range(4):
        bytes_ = [1, 127, 160, 0]
        bytes_[place] = byte
        word = int.from_bytes(bytes(bytes_), "little")
        scales = torch.cat([halves(half, torch.bfloat16) for half in run(_EXPONENTS.value, word)])
        expected = torch.exp2(torch.tensor(bytes_).double() - 33)
        others = [n for n in range(4) if n != place]
        assert torch.equal(scales[others], expected[others])
