"""``expert_mlp`` and ``combine`` against their torch forms.

Legend: T tokens, K choices a token, E experts, S rows of weights, H hidden size, I intermediate
size, N columns of the first product.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.kernels.activation import SUPPORTED, Activation
from vllm_moe_offload.kernels.dispatch import Dispatch, dispatch
from vllm_moe_offload.kernels.expert_mlp import (
    ExpertWeights,
    TileConfig,
    combine,
    combine_torch,
    expert_mlp,
    expert_mlp_torch,
    tile_config,
)

TINY = TileConfig(block_m=16, block_n=32, block_k=16, group_m=2, num_warps=4, num_stages=2)
NAN = float("nan")
# Twice the rounding of the products' results; the interpreter cuts bfloat16 off.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}
GAP = 8


@dataclass(frozen=True)
class Case:
    seed: int
    tokens: int
    choices: int
    num_experts: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    biased: bool
    weight_on_input: bool
    resident: float
    activation: Activation


@st.composite
def cases(draw) -> Case:
    return Case(
        seed=draw(st.integers(0, 2**20)),
        tokens=draw(st.sampled_from((1, 3, 17, 40))),
        choices=draw(st.integers(1, 3)),
        num_experts=draw(st.integers(1, 5)),
        hidden=draw(st.sampled_from((16, 33, 48))),
        intermediate=draw(st.sampled_from((7, 16, 40))),
        dtype=draw(st.sampled_from(sorted(TOLERANCE, key=str))),
        biased=draw(st.booleans()),
        weight_on_input=draw(st.booleans()),
        resident=draw(st.sampled_from((0.0, 0.5, 1.0))),
        activation=draw(st.sampled_from((Activation("silu"), Activation("relu2_no_mul")))),
    )


@dataclass(frozen=True)
class Tensors:
    x_TH: torch.Tensor
    weight_TK: torch.Tensor
    ids_TK: torch.Tensor
    row_of_E: torch.Tensor
    weights: ExpertWeights

    def poisoned_out(self) -> torch.Tensor:
        return self.x_TH.new_full((*self.ids_TK.shape, self.x_TH.shape[1]), NAN)


def packed_weights(case: Case, rows: torch.Tensor, device: torch.device) -> ExpertWeights:
    """Strided views over one buffer, NaN where no expert is and between the tensors of one."""
    columns = (2 if case.activation.is_gated else 1) * case.intermediate
    shapes = {
        "w13_SNH": (columns, case.hidden),
        "w2_SHI": (case.hidden, case.intermediate),
        "b13_SN": (columns,),
        "b2_SH": (case.hidden,),
    }
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    num_rows = case.num_experts + 1
    packed = torch.full((num_rows, sum(sizes.values()) + GAP * len(sizes)), NAN)
    views, offset = {}, 0
    for name, shape in shapes.items():
        packed[rows, offset : offset + sizes[name]] = torch.randn(rows.numel(), sizes[name]) * 0.3
        views[name] = (offset, shape)
        offset += sizes[name] + GAP
    packed = packed.to(device, case.dtype)
    tensors = {
        name: packed[:, offset : offset + sizes[name]].unflatten(1, shape)
        for name, (offset, shape) in views.items()
        if case.biased or name.startswith("w")
    }
    return ExpertWeights(**tensors)


def make(case: Case, device: torch.device) -> Tensors:
    torch.manual_seed(case.seed)
    shape = (case.tokens, case.choices)
    ids_TK = torch.randint(-1, case.num_experts, shape)
    x_TH = torch.randn(case.tokens, case.hidden)
    x_TH[(ids_TK < 0).all(1)] = NAN
    rows = torch.randperm(case.num_experts + 1)[: case.num_experts].int()
    rows[torch.rand(case.num_experts) >= case.resident] = -1
    return Tensors(
        x_TH.to(device, case.dtype),
        torch.rand(shape).to(device),
        ids_TK.to(device, torch.int32),
        rows.to(device),
        packed_weights(case, rows[rows >= 0].long(), device),
    )


def run_both(case: Case, tensors: Tensors, config: TileConfig) -> None:
    out_TKH, expected = tensors.poisoned_out(), tensors.poisoned_out()
    arguments = (
        tensors.x_TH, tensors.weight_TK, tensors.ids_TK, tensors.row_of_E, tensors.weights,
        case.activation,
    )  # fmt: skip
    expert_mlp(*arguments, out_TKH, weight_on_input=case.weight_on_input, config=config)
    expert_mlp_torch(*arguments, expected, weight_on_input=case.weight_on_input)
    assert torch.equal(out_TKH.isnan(), expected.isnan()), "wrote too little or too much"
    tolerance = TOLERANCE[case.dtype]
    scale = float(expected.float().abs().nan_to_num().max())
    torch.testing.assert_close(
        out_TKH.float(), expected.float(), rtol=tolerance, atol=tolerance * scale, equal_nan=True
    )


@given(case=cases())
def test_expert_mlp(case, device):
    run_both(case, make(case, device), TINY)


BASE = Case(
    seed=1, tokens=6, choices=2, num_experts=3, hidden=32, intermediate=20,
    dtype=torch.float32, biased=True, weight_on_input=False, resident=1.0,
    activation=Activation("silu"),
)  # fmt: skip

ACTIVATIONS = [Activation(name) for name in sorted(SUPPORTED)] + [
    Activation("silu", limit=0.5),
    Activation("swigluoai_uninterleave", limit=0.7, alpha=1.3, beta=0.5),
    Activation("swiglustep", limit=0.4),
    Activation("situ", situ_beta=0.8, situ_linear_beta=1.5),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_every_activation(activation, device):
    case = replace(BASE, activation=activation)
    run_both(case, make(case, device), TINY)


def test_every_activation_over_its_whole_range(device):
    # One token an input value; the first product only spreads it over gate and up.
    values = torch.cat(
        [torch.linspace(-12, 12, 23), torch.tensor([0.0, 1e-4, -0.01, 0.249, 0.3, 40.0])]
    )
    for activation in ACTIVATIONS:
        case = replace(
            BASE, tokens=values.numel(), choices=1, num_experts=1, hidden=16, intermediate=16,
            biased=False, activation=activation,
        )  # fmt: skip
        tensors = make(case, device)
        tensors.ids_TK.zero_()
        tensors.weight_TK.fill_(1.0)
        tensors.x_TH.copy_(values[:, None].expand(-1, 16))
        row = int(tensors.row_of_E[0])
        w13_NH, w2_HI = tensors.weights.w13_SNH[row], tensors.weights.w2_SHI[row]
        w13_NH.zero_()
        w13_NH[:, 0] = torch.tensor([1.0, 0.5, -0.25, 1.0], device=device).repeat(
            w13_NH.shape[0] // 4
        )
        w2_HI.copy_(torch.eye(16))
        out, expected = tensors.poisoned_out(), tensors.poisoned_out()
        arguments = (
            tensors.x_TH, tensors.weight_TK, tensors.ids_TK, tensors.row_of_E, tensors.weights,
            activation,
        )  # fmt: skip
        expert_mlp(*arguments, out, config=TINY)
        expert_mlp_torch(*arguments, expected)
        # In gelu's tail one plus erf cancels, in either form.
        absolute = 1e-6 if "gelu" in activation.name else 2e-8
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=absolute, msg=str(activation))


@given(case=cases(), split=st.integers(0, 2**5))
@settings(max_examples=8)
def test_the_same_bits_whatever_is_resident(case, split, device):
    case = replace(case, resident=1.0)
    tensors = make(case, device)
    config = replace(TINY, block_n=64)
    at_once = tensors.poisoned_out()
    expert_mlp(
        tensors.x_TH, tensors.weight_TK, tensors.ids_TK, tensors.row_of_E, tensors.weights,
        case.activation, at_once, config=config,
    )  # fmt: skip
    lists = Dispatch.empty(tensors.ids_TK.numel(), case.num_experts, config.block_m, device)
    dispatch(tensors.ids_TK, lists)
    apart = tensors.poisoned_out()
    chosen = torch.tensor([bool(split >> e & 1) for e in range(case.num_experts)], device=device)
    for part in (chosen, ~chosen):
        row_of_E = torch.where(part, tensors.row_of_E, -1).int()
        expert_mlp(
            tensors.x_TH, tensors.weight_TK, tensors.ids_TK, row_of_E, tensors.weights,
            case.activation, apart, config=config, dispatch=lists,
        )  # fmt: skip
    assert torch.equal(at_once.isnan(), apart.isnan())
    assert torch.equal(at_once.nan_to_num(), apart.nan_to_num())


def test_no_rows_of_weights_at_all(device):
    tensors = make(replace(BASE, resident=0.0), device)
    weights = ExpertWeights(tensors.weights.w13_SNH[:0], tensors.weights.w2_SHI[:0])
    out_TKH = tensors.poisoned_out()
    expert_mlp(
        tensors.x_TH, tensors.weight_TK, tensors.ids_TK, tensors.row_of_E, weights,
        Activation("silu"), out_TKH,
    )  # fmt: skip
    assert bool(out_TKH.isnan().all())


def test_tiles_that_the_pairs_were_not_sorted_for(device):
    tensors = make(BASE, device)
    lists = Dispatch.empty(tensors.ids_TK.numel(), BASE.num_experts, 32, device)
    with pytest.raises(AssertionError, match="other tiles"):
        expert_mlp(
            tensors.x_TH, tensors.weight_TK, tensors.ids_TK, tensors.row_of_E, tensors.weights,
            BASE.activation, tensors.poisoned_out(), dispatch=lists, config=TINY,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("tokens", [1, 70])
def test_the_default_tiles(tokens, dtype, device):
    case = replace(BASE, tokens=tokens, hidden=64, intermediate=24, dtype=dtype)
    pairs = case.tokens * case.choices
    config = tile_config(case.num_experts, 2 * case.intermediate, case.hidden, pairs, dtype)
    run_both(case, make(case, device), config)


def test_tiles_from_a_tuned_table():
    entry = {
        "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1,
        "num_warps": 8, "num_stages": 5,
    }  # fmt: skip
    assert TileConfig.from_table(entry) == TileConfig(16, 64, 128, 1, 8, 5)


@given(
    tokens=st.integers(0, 5),
    choices=st.integers(1, 9),
    hidden=st.sampled_from((1, 16, 33, 1500)),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    ids_dtype=st.sampled_from((torch.int32, torch.int64)),
    seed=st.integers(0, 2**20),
)
def test_combine(tokens, choices, hidden, dtype, ids_dtype, seed, device):
    torch.manual_seed(seed)
    ids_TK = torch.randint(-2, 3, (tokens, choices)).to(device, ids_dtype)
    rows_TKH = torch.randn(tokens, choices, hidden).to(device, dtype)
    rows_TKH[ids_TK < 0] = NAN
    y_TH, expected = (torch.full((tokens, hidden), NAN).to(device, dtype) for _ in range(2))
    combine(rows_TKH, ids_TK, y_TH)
    combine_torch(rows_TKH, ids_TK, expected)
    if device.type == "cpu" and dtype == torch.bfloat16:
        # The interpreter cuts off where the device rounds: one unit in the last place.
        torch.testing.assert_close(y_TH, expected, rtol=2**-7, atol=0)
    else:
        assert torch.equal(y_TH, expected)
