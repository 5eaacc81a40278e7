"""``quantised_mlp`` against its torch form, for every format.

Legend: T tokens, K choices a token, E experts, S rows of weights, H hidden size, I intermediate
size, N columns of the first product.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from formats_of_tests import FORMATS, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.kernels import gpu
from vllm_moe_offload.kernels._decode_triton import code_scale, e2m1
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.dispatch import Dispatch, dispatch
from vllm_moe_offload.kernels.formats import ExpertFormat, quantise_torch
from vllm_moe_offload.kernels.quantised_mlp import (
    QuantisedWeights,
    quantise_inputs,
    quantised_mlp,
    quantised_mlp_torch,
)
from vllm_moe_offload.kernels.quantised_tiles import QuantisedTiles, quantised_tiles

NAN = float("nan")
SILU = Activation("silu")
# Twice the rounding of the products' results; the interpreter cuts bfloat16 off.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    seed: int
    form: ExpertFormat
    tokens: int = 6
    choices: int = 2
    num_experts: int = 3
    hidden: int = 192
    intermediate: int = 64
    dtype: torch.dtype = torch.float32
    biased: bool = False
    weight_on_input: bool = False
    resident: float = 1.0
    rounds_inside: bool = False
    swapped: bool = False
    activation: Activation = SILU

    @property
    def columns(self) -> int:
        return (2 if self.activation.is_gated else 1) * self.intermediate


@st.composite
def cases(draw) -> Case:
    form = draw(st.sampled_from(list(FORMATS.values())))
    step = form.scale_terms if 0 < form.scale_terms < 128 else 32
    return Case(
        seed=draw(st.integers(0, 2**20)),
        form=form,
        tokens=draw(st.sampled_from((1, 3, 17, 40))),
        choices=draw(st.integers(1, 3)),
        num_experts=draw(st.integers(1, 4)),
        hidden=step * draw(st.integers(1, 5)),
        intermediate=step * draw(st.integers(1, 3)),
        dtype=draw(st.sampled_from(sorted(TOLERANCE, key=str))),
        biased=draw(st.booleans()),
        weight_on_input=draw(st.booleans()),
        resident=draw(st.sampled_from((0.0, 0.5, 1.0))),
        rounds_inside=form.inputs == "group" and draw(st.booleans()),
        swapped=form.bits == 4 and draw(st.booleans()),
        activation=draw(st.sampled_from((SILU, Activation("swigluoai")))),
    )


@dataclass(frozen=True)
class Tensors:
    x_TH: torch.Tensor
    weight_TK: torch.Tensor
    ids_TK: torch.Tensor
    row_of_E: torch.Tensor
    weights: QuantisedWeights

    def poisoned_out(self) -> torch.Tensor:
        return self.x_TH.new_full((*self.ids_TK.shape, self.x_TH.shape[1]), NAN)


def make(case: Case, device: torch.device) -> Tensors:
    if case.form.inputs and case.dtype == torch.bfloat16 and device.type == "cpu":
        # The interpreter cuts bfloat16 off, a bias that the rounding to e4m3 makes larger.
        case = replace(case, dtype=torch.float16)
    torch.manual_seed(case.seed)
    shape = (case.tokens, case.choices)
    ids_TK = torch.randint(-1, case.num_experts, shape)
    x_TH = torch.randn(case.tokens, case.hidden)
    x_TH[(ids_TK < 0).all(1)] = NAN
    rows = torch.randperm(case.num_experts + 1)[: case.num_experts].int()
    rows[torch.rand(case.num_experts) >= case.resident] = -1
    weights = random_rows(
        case.form, rows[rows >= 0].tolist(), case.num_experts + 1, case.columns, case.hidden,
        case.intermediate, bias=case.dtype if case.biased else None, device=device,
    )  # fmt: skip
    return Tensors(
        x_TH.to(device, case.dtype),
        torch.rand(shape).to(device),
        ids_TK.to(device, torch.int32),
        rows.to(device),
        weights,
    )


def small_tiles(case: Case) -> QuantisedTiles:
    tiles = quantised_tiles(case.form, 1, 1, torch.float32)
    tiles = replace(tiles, block_n=32, group_m=2, rounds_inside=case.rounds_inside)
    return replace(tiles, block_m=8, swapped=True) if case.swapped else tiles


def run_both(case: Case, tensors: Tensors, config: QuantisedTiles) -> None:
    out_TKH, expected = tensors.poisoned_out(), tensors.poisoned_out()
    arguments = (
        tensors.x_TH, tensors.weight_TK, tensors.ids_TK, tensors.row_of_E, tensors.weights,
        case.activation,
    )  # fmt: skip
    quantised_mlp(*arguments, out_TKH, weight_on_input=case.weight_on_input, config=config)
    quantised_mlp_torch(*arguments, expected, weight_on_input=case.weight_on_input)
    assert torch.equal(out_TKH.isnan(), expected.isnan()), "wrote too little or too much"
    dtype = tensors.x_TH.dtype
    if not case.form.inputs:
        assert off(out_TKH, expected) < TOLERANCE[dtype]
        return
    # A value between the products that falls on the other side of a tie is off by a step of
    # e4m3, up to an eighth. In float32 nearly none does; float16 and bfloat16 round values by
    # 2^-11 and 2^-9 before that, which is one value in 128 or 32.
    assert off_as_a_whole(out_TKH, expected) < (0.01 if dtype == torch.float32 else 0.04)


def off(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in parts of the largest value."""
    out, expected = out.float().nan_to_num(), expected.float().nan_to_num()
    return float((out - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def off_as_a_whole(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference in parts of the length of all values."""
    out, expected = out.float().nan_to_num(), expected.float().nan_to_num()
    return float((out - expected).norm() / expected.norm().clamp(min=1e-30))


@given(case=cases())
@settings(max_examples=25)
def test_quantised_mlp(case, device):
    run_both(case, make(case, device), small_tiles(case))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_every_format(form, device):
    case = Case(seed=3, form=form, hidden=256, intermediate=128, biased=True)
    run_both(case, make(case, device), small_tiles(case))
    if form.bits == 4:
        swapped = replace(case, swapped=True, dtype=torch.bfloat16)
        run_both(swapped, make(swapped, device), small_tiles(swapped))


@pytest.mark.parametrize(
    ("tokens", "num_experts"), [(1, 16), (1, 2), (4, 2), (6, 2), (60, 2), (70, 2)]
)
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_the_default_tiles(form, tokens, num_experts, device):
    case = Case(seed=4, form=form, tokens=tokens, dtype=torch.bfloat16, num_experts=num_experts)
    config = quantised_tiles(form, num_experts, tokens * case.choices, case.dtype)
    run_both(case, make(case, device), config)


def test_tiles_of_every_step_fit_the_scales():
    """Scales may not cross tiles, and groups of rounded activations are tiles."""
    for form in FORMATS.values():
        for pairs in (1, 16, 128, 256, 1024, 4096, 65536):
            for dtype in TOLERANCE:
                tiles = quantised_tiles(form, 128, pairs, dtype)
                group = form.scale_terms
                assert not group or tiles.block_k % group == 0 or group % tiles.block_k == 0
                assert form.inputs != "group" or tiles.block_k == group
                assert form.inputs == "group" or not tiles.rounds_inside


@given(case=cases(), split=st.integers(0, 2**5))
@settings(max_examples=8)
def test_the_same_bits_whatever_is_resident(case, split, device):
    case = replace(case, resident=1.0)
    tensors, config = make(case, device), small_tiles(case)
    at_once, apart = tensors.poisoned_out(), tensors.poisoned_out()
    arguments = (tensors.x_TH, tensors.weight_TK, tensors.ids_TK)
    quantised_mlp(
        *arguments, tensors.row_of_E, tensors.weights, case.activation, at_once, config=config
    )
    lists = Dispatch.empty(tensors.ids_TK.numel(), case.num_experts, config.block_m, device)
    dispatch(tensors.ids_TK, lists)
    inputs = quantise_inputs(tensors.x_TH, case.form, config)
    chosen = torch.tensor([bool(split >> e & 1) for e in range(case.num_experts)], device=device)
    for part in (chosen, ~chosen):
        row_of_E = torch.where(part, tensors.row_of_E, -1).int()
        quantised_mlp(
            *arguments, row_of_E, tensors.weights, case.activation, apart, config=config,
            dispatch=lists, inputs=inputs,
        )  # fmt: skip
    assert torch.equal(at_once.isnan(), apart.isnan())
    assert torch.equal(at_once.nan_to_num(), apart.nan_to_num())


@triton.jit
def decode_kernel(codes, values):
    code = tl.arange(0, 16)
    tl.store(values + code, e2m1(tl.load(codes + code)))


def test_4_bit_floats(device):
    codes = torch.arange(16, dtype=torch.uint8, device=device)
    values = torch.empty(16, device=device)
    decode_kernel[(1,)](codes, values)
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values.tolist() == positive + [-v for v in positive]


@triton.jit
def code_scale_kernel(scales, values):
    place = tl.arange(0, 256)
    tl.store(values + place, code_scale(tl.load(scales + place)))


def test_every_power_of_two(device):
    scales = torch.arange(256, dtype=torch.int16).to(torch.uint8).to(device)
    values = torch.empty(256, device=device)
    code_scale_kernel[(1,)](scales, values)
    assert values[:255].tolist() == [2.0**-127, *(2.0 ** (e - 127) for e in range(1, 255))]
    assert bool(values[255].isnan())


@given(
    rows=st.integers(1, 5),
    width=st.sampled_from((16, 128, 160, 300)),
    inputs=st.sampled_from(("group", "token")),
    exponent=st.integers(-30, 10),
    seed=st.integers(0, 2**20),
)
def test_activations_are_rounded_as_the_format_says(rows, width, inputs, exponent, seed, device):
    torch.manual_seed(seed)
    form = ExpertFormat(
        "fp8", "e4m3", torch.float32, scale_rows=128, scale_terms=128, inputs=inputs
    )
    # Values of many sizes in a row, so that some are below e4m3's normal range.
    x = torch.randn(rows, width) * torch.exp2(torch.randint(-12, 1, (rows, width))) * 2.0**exponent
    x[0, : width // 2] = 0.0
    x = x.to(device, torch.bfloat16)
    rounded = quantise_inputs(x, form, quantised_tiles(form, 1, 1, x.dtype))
    codes, scale = quantise_torch(x, inputs, 128)
    assert rounded.scale_TG is not None
    assert torch.equal(rounded.scale_TG, scale)
    assert torch.equal(rounded.x_TH.float(), codes.float())


@pytest.mark.parametrize("hidden", [16, 208])
@pytest.mark.parametrize("swapped", [False, True])
def test_scales_of_8_bits_without_the_type(hidden, swapped, device, monkeypatch):
    """GPUs without e4m3 read its bits, which changes none of a result's."""
    form = FORMATS["nvfp4"]
    case = Case(seed=5, form=form, hidden=hidden, dtype=torch.bfloat16, swapped=swapped)
    tensors, config = make(case, device), small_tiles(case)
    results = []
    for has_e4m3 in (True, False):
        monkeypatch.setattr(gpu, "has_e4m3", lambda _, has=has_e4m3: has)
        results.append(tensors.poisoned_out())
        quantised_mlp(
            tensors.x_TH, tensors.weight_TK, tensors.ids_TK, tensors.row_of_E, tensors.weights,
            case.activation, results[-1], config=config,
        )  # fmt: skip
    assert torch.equal(results[0].isnan(), results[1].isnan())
    assert torch.equal(results[0].nan_to_num(), results[1].nan_to_num())


@triton.jit
def e4m3_kernel(bits, values):
    place = tl.arange(0, 256)
    tl.store(values + place, code_scale(tl.load(bits + place)))


def test_every_scale_of_8_bits_without_the_type(device):
    bits = torch.arange(256, dtype=torch.int16, device=device).to(torch.int8)
    values = torch.empty(256, device=device)
    e4m3_kernel[(1,)](bits, values)
    expected = bits.view(torch.float8_e4m3fn).float()
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(), expected.nan_to_num())
