"""The formats of stored weights against their definitions, worked out number by number.

Legend: N rows and K terms of a matrix, C bytes of a row's codes.
"""

import math
from fractions import Fraction

import pytest
import torch
from formats_of_tests import FORMATS, layout_of, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.kernels.formats import (
    E4M3_MAX,
    ExpertFormat,
    QuantisedMatrix,
    dequantise,
    pack_4_bits,
    quantise_torch,
    unpack_4_bits,
)


def e4m3(byte):
    """1 sign, 4 exponent (bias 7), 3 mantissa bits; all ones is NaN, there is no infinity."""
    sign, exponent, mantissa = -1 if byte & 0x80 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * Fraction(mantissa, 8) * Fraction(2) ** -6
    return sign * (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


def e2m1(code):
    """1 sign, 2 exponent (bias 1), 1 mantissa bit; neither NaN nor infinity."""
    sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    if exponent == 0:
        return sign * Fraction(mantissa, 2)
    return sign * (1 + Fraction(mantissa, 2)) * Fraction(2) ** (exponent - 1)


def value_of(form, matrix, n, k, rows, terms):
    """One weight as an exact fraction."""
    codes = matrix.codes.view(torch.uint8)[0, n].tolist()
    code = codes[k] if form.bits == 8 else codes[k // 2] >> 4 * (k % 2) & 15
    group = k // form.scale_terms if form.scale_terms else 0
    if form.elements == "e4m3":
        value = e4m3(code)
    elif form.elements == "e2m1":
        value = e2m1(code)
    elif matrix.zero is None:
        value = Fraction(code - {4: 8, 8: 128}[form.bits])
    else:
        zeros = matrix.zero[0, :, group].tolist()
        value = Fraction(code - (zeros[n] if form.bits == 8 else zeros[n // 2] >> 4 * (n % 2) & 15))
    along_rows = matrix.scale.shape[1]
    tile = n // form.scale_rows if form.scale_rows else n * along_rows // rows
    scale = matrix.scale[0, tile, group]
    if scale.dtype == torch.uint8:
        value *= Fraction(2) ** (int(scale) - 127)
    elif scale.dtype == torch.float8_e4m3fn:
        value *= e4m3(int(scale.view(torch.uint8)))
    else:
        value *= Fraction(float(scale))
    if matrix.global_scale is not None:
        parts = matrix.global_scale[0]
        value *= Fraction(float(parts[n * parts.numel() // rows]))
    return value


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_dequantise_follows_the_definition(form):
    torch.manual_seed(5)
    columns, hidden, intermediate = 256, 384, 128
    weights = random_rows(form, [0], 1, columns, hidden, intermediate)
    for matrix, rows, terms in (
        (weights.w13, columns, hidden), (weights.w2, hidden, intermediate),
    ):  # fmt: skip
        decoded = dequantise(matrix, form, 0)
        assert decoded.shape == (rows, terms)
        for n in (0, 1, 63, 64, 127, 128, rows // 2, rows - 1):
            for k in (0, 1, 15, 16, 31, 32, 63, 64, 127, terms - 1):
                expected = float(value_of(form, matrix, n, k, rows, terms))
                assert float(decoded[n, k]) == pytest.approx(expected, rel=2e-7, abs=0), (n, k)


def test_every_code_of_the_floating_types():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 256)
    one = torch.ones(1, 1, 1)
    form = ExpertFormat("fp8", "e4m3", torch.float32)
    matrix = QuantisedMatrix(codes.view(torch.float8_e4m3fn), one)
    for code, value in enumerate(dequantise(matrix, form, 0)[0].tolist()):
        expected = e4m3(code)
        assert value == expected or (math.isnan(value) and math.isnan(expected)), code
    form = ExpertFormat("mxfp4", "e2m1", torch.float32)
    decoded = dequantise(QuantisedMatrix(codes, one), form, 0)[0].tolist()
    assert decoded == [float(e2m1(c)) for b in range(256) for c in (b & 15, b >> 4)]


def test_every_scale_of_mxfp4():
    form = FORMATS["mxfp4"]
    codes = torch.full((256, 1, 16), 0x22, dtype=torch.uint8)  # all ones
    scale = torch.arange(256, dtype=torch.uint8).view(256, 1, 1)
    for exponent in range(255):
        decoded = dequantise(QuantisedMatrix(codes, scale), form, exponent)
        assert set(decoded.flatten().tolist()) == {2.0 ** (exponent - 127)}
    assert bool(dequantise(QuantisedMatrix(codes, scale), form, 255).isnan().all())


@given(
    codes=st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0)
)
def test_packing_puts_the_first_code_into_the_lower_bits(codes):
    packed = pack_4_bits(torch.tensor([codes]))
    assert packed[0].tolist() == [a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)]
    assert unpack_4_bits(packed)[0].tolist() == codes


@given(
    seed=st.integers(0, 2**20),
    width=st.sampled_from((5, 128, 300)),
    exponent=st.integers(-40, 30),
    inputs=st.sampled_from(("group", "token", "static")),
)
@settings(max_examples=60, deadline=None)
def test_rounded_activations_are_the_nearest_that_e4m3_has(seed, width, exponent, inputs):
    torch.manual_seed(seed)
    x = torch.randn(3, width) * 2.0**exponent
    x[0] = 0
    input_scale = x.abs().amax() / 300 if inputs == "static" else None
    codes, scale = quantise_torch(x, inputs, 128, input_scale)
    group = 128 if inputs == "group" else width
    assert scale.shape == (3, -(-width // group))
    spread = scale.repeat_interleave(group, 1)[:, :width]
    if inputs != "static":
        assert float(codes.float().abs().max()) <= E4M3_MAX
    # Half a step: an eighth of a power of two, and not less than 2^-9 near zero.
    step = torch.exp2(torch.floor(torch.log2((x / spread).abs().clamp(min=2**-6)))) / 8
    error = (codes.float() - x / spread).abs()
    assert bool((error <= step / 2 * 1.001).all())


REAL = {
    # columns, hidden, intermediate
    "Qwen3-30B-A3B": (2 * 768, 2048, 768),
    "gpt-oss-120b": (2 * 2880, 2880, 2880),
    "DeepSeek-V3": (2 * 2048, 7168, 2048),
    "Mixtral-8x7B": (2 * 14336, 4096, 14336),
}


@pytest.mark.parametrize("shape", REAL.values(), ids=REAL)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_row_of_a_real_model_has_less_than_a_hundredth_of_padding(form, shape):
    bias = torch.bfloat16 if form.name == "mxfp4" else None
    layout = layout_of(form, *shape, bias)
    assert layout.row_bytes < 1.01 * layout.num_bytes
    columns, hidden, intermediate = shape
    codes = (columns * hidden + hidden * intermediate) * form.bits // 8
    assert layout.num_bytes >= codes


def test_a_row_has_the_bytes_of_the_checkpoint():
    layout = layout_of(FORMATS["mxfp4"], 5760, 2880, 2880, torch.bfloat16)
    weights = 3 * 2880 * 2880
    assert layout.num_bytes == weights // 2 + weights // 32 + 2 * (5760 + 2880)
    layout = layout_of(FORMATS["fp8 block"], 1536, 2048, 768, None)
    assert layout.num_bytes == 3 * 768 * 2048 + 4 * (12 * 16 + 16 * 6)
