import math

import pytest
import torch

from vllm_moe_offload.damage import damaged_weights

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


def test_codes_and_scales_are_left_to_others():
    views = {
        "w13_weight": torch.full((2, 8), 255, dtype=torch.uint8),
        "w13_scale": torch.full((2, 8), math.nan),
    }
    assert damaged_weights(views) == []
