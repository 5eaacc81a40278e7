import math

import pytest
import torch

from vllm_moe_offload.damage import Damage, damaged_input_scales, damaged_weights

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def whole(dtype=torch.float32):
    """Weights and biases of four experts."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w13_weight": (4, 6, 5), "w2_weight": (4, 5, 3), "w13_bias": (4, 6)}
    return {name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in shapes.items()}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_weights(dtype):
    assert damaged_weights(whole(dtype)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("value", "problem"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")]
)
@pytest.mark.parametrize(
    ("name", "place", "half"),
    [("w13_weight", (2, 0, 4), 0), ("w13_weight", (2, 5, 0), 1), ("w2_weight", (2, 1, 1), 0),
     ("w13_bias", (2, 3), 1)],
)  # fmt: skip
def test_one_bad_number(dtype, value, problem, name, place, half):
    views = whole(dtype)
    views[name][place] = value
    (damage,) = damaged_weights(views)
    assert (damage.tensor, damage.expert, damage.half) == (name, 2, half)
    assert damage.problem == problem


def test_experts_in_order():
    views = whole()
    views["w13_weight"][3, 1, 1] = math.nan
    views["w2_weight"][1, 1, 1] = math.nan
    assert [damage.expert for damage in damaged_weights(views)] == [1, 3]


def test_opposite_infinities():
    views = whole()
    views["w2_weight"][1, 1, :2] = torch.tensor([math.inf, -math.inf])
    assert [damage.problem for damage in damaged_weights(views)] == ["infinity"]


def test_large_numbers_are_no_damage():
    views = whole(torch.float16)
    views["w2_weight"].fill_(60000)
    assert views["w2_weight"][0].sum().isinf()
    assert damaged_weights(views) == []


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize(("row", "half"), [(0, 0), (5, 1)])
def test_nan_among_e4m3_codes(code, row, half):
    """Looked for in rows that are parts of longer ones, as in the pool."""
    pool_EB = torch.zeros(4, 64, dtype=torch.uint8)
    codes = pool_EB[:, 8:38].view(4, 6, 5)
    codes.copy_(torch.arange(0x7F).repeat(2)[:120].view(4, 6, 5))
    codes[:2] |= 0x80
    pool_EB[:, 38:] = 0xFF
    views = {"w13_weight": codes.view(torch.float8_e4m3fn)}
    assert damaged_weights(views) == []
    codes[2, row, 3] = code
    assert damaged_weights(views) == [Damage("w13_weight", 2, "NaN", half)]


def test_every_other_e4m3_code_is_a_number():
    codes = torch.arange(256)[(torch.arange(256) & 0x7F) != 0x7F].to(torch.uint8)
    views = {"w2_weight": codes.view(torch.float8_e4m3fn)[None, None]}
    assert views["w2_weight"].float().isfinite().all()
    assert damaged_weights(views) == []


def test_other_codes_and_scales_are_left_to_others():
    views = {
        "w13_weight": torch.full((2, 8), 255, dtype=torch.uint8),
        "w13_scale": torch.full((2, 8), math.nan),
        "w2_scale": torch.full((2, 8), math.nan).to(torch.float8_e4m3fn),
    }
    assert damaged_weights(views) == []


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf, -math.inf])
def test_scales_of_activations(value):
    scales = {"w13_input_scale": torch.ones(4, 2), "w2_input_scale": torch.ones(4)}
    assert damaged_input_scales(scales) == []
    scales["w13_input_scale"][2, 1] = scales["w2_input_scale"][3] = value
    assert damaged_input_scales(scales) == [
        Damage("w13_input_scale", 2, f"{value:g}", half=1),
        Damage("w2_input_scale", 3, f"{value:g}"),
    ]
