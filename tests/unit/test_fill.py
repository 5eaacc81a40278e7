import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.fill import Gap, gaps, mark
from vllm_moe_offload.layout import ExpertLayout

EXPERTS = 3
SHAPES = {"w13_weight": (4, 6), "w2_weight": (5, 2), "w13_bias": (8,), "w2_bias": (3,)}
HALVES = [(name, e, half) for name in SHAPES for e in range(EXPERTS) for half in (0, 1)]

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def views(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    layout = ExpertLayout.pack((name, shape, dtype) for name, shape in SHAPES.items())
    return layout.views(torch.zeros(EXPERTS, layout.row_bytes, dtype=torch.uint8))


@given(dtypes, st.sets(st.sampled_from(HALVES)), st.integers(0, 1 << 20))
def test_gaps_are_what_nobody_wrote(dtype, written, seed):
    tensors = views(dtype)
    mark(tensors)
    generator = torch.Generator().manual_seed(seed)
    for name, expert, half in written:
        middle = SHAPES[name][0] // 2
        part = tensors[name][expert, middle:] if half else tensors[name][expert, :middle]
        part.copy_(torch.randn(part.shape, generator=generator))
    assert {(gap.tensor, gap.expert, gap.half) for gap in gaps(tensors)} == set(HALVES) - written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, float("inf"), float("nan"), -float("nan")])
def test_any_value_counts_as_written(dtype, value):
    tensors = views(dtype)
    mark(tensors)
    assert len(gaps(tensors)) == len(HALVES)
    for tensor in tensors.values():
        tensor.fill_(value)
    assert gaps(tensors) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mark_is_a_nan(dtype):
    tensors = views(dtype)
    mark(tensors)
    assert all(bool(tensor.isnan().any(-1).any()) for tensor in tensors.values())


CODES = [torch.int32, torch.uint8, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("written", [(), (0,), (1,), (0, 1)])
def test_gaps_in_codes(dtype, beside, written):
    shape = (8, 32) if beside else (32, 8)
    layout = ExpertLayout.pack([("w13", shape, dtype)])
    tensors = layout.views(torch.zeros(EXPERTS, layout.row_bytes, dtype=torch.uint8))
    transposed = frozenset({"w13"}) if beside else frozenset()
    mark(tensors, transposed)
    for half in written:
        tensors["w13"].view(torch.uint8).chunk(2, dim=2 if beside else 1)[half].fill_(1)
    missing = {(g.expert, g.half) for g in gaps(tensors, transposed)}
    assert missing == {(e, h) for e in range(EXPERTS) for h in {0, 1} - set(written)}


@pytest.mark.parametrize("shape", [(6, 90), (10, 4), (4, 5)])
@pytest.mark.parametrize("written", [(), (0,), (1,), (0, 1)])
def test_gaps_in_codes_of_rows_of_any_width(shape, written):
    """Such as gpt-oss's scales, 90 bytes a row."""
    layout = ExpertLayout.pack([("w13_scale", shape, torch.uint8)])
    tensors = layout.views(torch.zeros(EXPERTS, layout.row_bytes, dtype=torch.uint8))
    mark(tensors)
    for half in written:
        tensors["w13_scale"].chunk(2, dim=1)[half].fill_(127)
    missing = {(g.expert, g.half) for g in gaps(tensors)}
    assert missing == {(e, h) for e in range(EXPERTS) for h in {0, 1} - set(written)}


def test_one_number_an_expert():
    tensors = {"input": torch.zeros(EXPERTS), "global": torch.zeros(EXPERTS, 2)}
    mark(tensors)
    tensors["input"][1] = tensors["global"][2, 1] = 1.0
    assert set(gaps(tensors)) == {
        Gap("input", 0, 0), Gap("input", 2, 0), Gap("global", 2, 0),
        *(Gap("global", e, half) for e in (0, 1) for half in (0, 1)),
    }  # fmt: skip


def test_tensors_too_small_for_a_mark_are_left_alone():
    tensors = {
        "qzeros": torch.ones(EXPERTS, 7, dtype=torch.uint8),
        "fp8": torch.ones(EXPERTS, 2, 3).to(torch.float8_e4m3fn),
    }
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    mark(tensors)
    assert gaps(tensors) == []
    assert all(torch.equal(tensors[n].view(torch.uint8), before[n].view(torch.uint8))
               for n in tensors)  # fmt: skip


def test_a_tensor_of_one_row():
    tensors = {"w": torch.zeros(2, 1, 4)}
    mark(tensors)
    tensors["w"][0] = 1.0
    assert gaps(tensors) == [Gap("w", 1, 0)]
