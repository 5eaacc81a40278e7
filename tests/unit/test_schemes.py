"""How methods' parameters become rows, with methods that only say what they are.

Legend: E experts, N rows and K terms of a weight.
"""

from types import SimpleNamespace

import pytest
import torch

from vllm_moe_offload.damage import Damage, damaged_scales
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.formats import ExpertFormat, dequantise
from vllm_moe_offload.kernels.quantised_mlp import QuantisedWeights
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.quantised_checkpoints import _QUANTISERS
from vllm_moe_offload.schemes import EXPERTS_AT_ONCE, scheme_of

EXPERTS, HIDDEN, INTERMEDIATE = EXPERTS_AT_ONCE + 2, 128, 128
COLUMNS = 2 * INTERMEDIATE


def method(kind, **attributes):
    moe = SimpleNamespace(is_act_and_mul=True)
    return type(kind, (), {"moe": moe, **attributes})()


def config(**fields):
    return SimpleNamespace(**fields)


INTEGERS = {"weight_bits": 4, "group_size": 32}
METHODS = {
    "gptq": method(
        "AutoGPTQMoEMethod", quant_config=config(**INTEGERS, desc_act=False, is_sym=True)
    ),
    "gptq-8bit": method(
        "AutoGPTQMoEMethod",
        quant_config=config(weight_bits=8, group_size=32, desc_act=False, is_sym=True),
    ),
    "awq": method("AutoAWQMoEMethod", quant_config=config(**INTEGERS, zero_point=True)),
    "w4a16": method(
        "CompressedTensorsWNA16MoEMethod", symmetric=True, num_bits=4, group_size=32,
        weight_quant=config(actorder=None),
    ),
    "w4a16-zeros": method(
        "CompressedTensorsWNA16MoEMethod", symmetric=False, num_bits=4, group_size=64,
        weight_quant=config(actorder=None),
    ),
}  # fmt: skip


def quantised(form, rows, terms, *, halves=1):
    """Parameters [E, ...] of one matrix by ending, gate and up joined, and what they mean."""
    quantise, parts, values = _QUANTISERS[form], [], []
    for _ in range(EXPERTS):
        cut = [quantise(torch.randn(rows // halves, terms)) for _ in range(halves)]
        values.append(torch.cat([value for _, value in cut]))
        beside = form.startswith(("gptq", "awq"))
        parts.append(
            {k: torch.cat([part[k] for part, _ in cut], 1 if beside else 0)
             for k in cut[0][0] if k not in ("g_idx", "weight_shape")}
        )  # fmt: skip
    return {k: torch.stack([part[k] for part in parts]) for k in parts[0]}, torch.stack(values)


def loaded(form):
    torch.manual_seed(3)
    scheme = scheme_of(METHODS[form], "layer", rounds_inputs=True)
    w13, values13 = quantised(form, COLUMNS, HIDDEN, halves=2)
    w2, values2 = quantised(form, HIDDEN, INTERMEDIATE)
    parameters = {f"w13_{k}": v for k, v in w13.items()} | {f"w2_{k}": v for k, v in w2.items()}
    read, filled = scheme.layouts(parameters, COLUMNS, HIDDEN, INTERMEDIATE, None)
    rows = torch.zeros(EXPERTS, read.row_bytes, dtype=torch.uint8)
    views = filled.views(rows)
    for name, view in views.items():
        view.copy_(parameters[name])
    scheme.put_in_order(views, read.views(rows), {})
    return scheme, read.views(rows), (values13, values2)


@pytest.mark.parametrize("form", METHODS)
def test_loaded_rows_mean_what_was_packed(form):
    scheme, views, values = loaded(form)
    weights = QuantisedWeights.of(scheme.format, views)
    for expert in range(EXPERTS):
        for matrix, expected in zip((weights.w13, weights.w2), values, strict=True):
            decoded = dequantise(matrix, scheme.format, expert)
            assert torch.allclose(decoded, expected[expert], rtol=1e-6, atol=0)


def test_a_row_holds_what_travels_alone():
    """GPTQ's group indices, and its zero points if they are all the same, stay behind."""
    scheme, _, _ = loaded("gptq")
    assert set(scheme.places.values()) == {
        "w13_qweight", "w13_scales", "w2_qweight", "w2_scales"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "attributes", "named"),
    [
        ("CompressedTensorsW8A8Int8MoEMethod", {}, "CompressedTensorsW8A8Int8MoEMethod"),
        (
            "AutoGPTQMoEMethod",
            {"quant_config": config(**INTEGERS, desc_act=True, is_sym=True)},
            "act-order",
        ),
        (
            "CompressedTensorsWNA16MoEMethod",
            {"num_bits": 3, "symmetric": True, "group_size": 32,
             "weight_quant": config(actorder=None)},
            "3 bits",
        ),
        (
            "CompressedTensorsWNA16MoEMethod",
            {"num_bits": 4, "symmetric": True, "group_size": 48,
             "weight_quant": config(actorder=None)},
            "48",
        ),
        (
            "CompressedTensorsWNA16MoEMethod",
            {"num_bits": 4, "symmetric": True, "group_size": 32,
             "weight_quant": config(actorder="group")},
            "actorder",
        ),
        (
            "AutoGPTQMoEMethod",
            {"quant_config": config(**INTEGERS, desc_act=False, is_sym=False)},
            "zero points",
        ),
        (
            "AutoAWQMoEMethod",
            {"quant_config": config(**INTEGERS, zero_point=False)},
            "without zero points",
        ),
        (
            "MoeWNA16Method",
            {"quant_config": config(**INTEGERS, has_zp=False, linear_quant_method="awq")},
            "without zero points",
        ),
        (
            "Fp8MoEMethod",
            {"quant_config": config(is_checkpoint_fp8_serialized=False)},
            "not quantised itself",
        ),
        (
            "Fp8MoEMethod",
            {"quant_config": config(is_checkpoint_fp8_serialized=True),
             "block_quant": True, "moe_block_shape": [16, 16]},
            "sizes of 32, 64, 128 alone",
        ),
    ],
)  # fmt: skip
def test_refusals(kind, attributes, named):
    with pytest.raises(OffloadError) as error:
        scheme_of(method(kind, **attributes), "model.layers.3.experts", rounds_inputs=True)
    message = str(error.value)
    assert named in message
    assert "model.layers.3.experts" in message
    assert all(word in message for word in ("fp8", "GPTQ", "AWQ", "MXFP4", "nvfp4"))


def test_devices_without_e4m3_round_weights_alone():
    block = method(
        "Fp8MoEMethod", block_quant=True, moe_block_shape=[128, 128],
        quant_config=config(is_checkpoint_fp8_serialized=True),
    )  # fmt: skip
    assert scheme_of(block, "layer", rounds_inputs=True).format.inputs == "group"
    assert scheme_of(block, "layer", rounds_inputs=False).format.inputs is None


def test_undamaged_scales():
    for form in METHODS:
        scheme, views, _ = loaded(form)
        assert damaged_scales(scheme.format, views) == []


@pytest.mark.parametrize(
    ("value", "problem"), [(float("nan"), "NaN"), (float("inf"), "infinity"), (0.0, "zero")]
)
def test_damaged_scales(value, problem):
    scheme, views, _ = loaded("w4a16")
    views["w2_scale"][5, 7, 1] = value
    (damage,) = damaged_scales(scheme.format, views)
    assert (damage.tensor, damage.expert) == ("w2_scale", 5)
    assert damage.problem.startswith(problem)


@pytest.mark.parametrize(("byte", "problem"), [(255, "NaN"), (161, "a scale above 2^33")])
def test_damaged_powers_of_two(byte, problem):
    scales = torch.full((3, 4, 2), 160, dtype=torch.uint8)
    scales[2, 1, 0] = byte
    form = ExpertFormat("mxfp4", "e2m1", torch.uint8, scale_terms=32)
    assert damaged_scales(form, {"w2_scale": scales}) == [Damage("w2_scale", 2, problem)]


def test_integers_may_have_negative_scales_and_zeros_without_weights():
    scheme, views, _ = loaded("w4a16")
    views["w2_scale"][5, 7, 1] = -1.0
    views["w2_scale"][6, 0, 0] = 0.0
    views["w2_weight"][6, 0, :16] = 0x88
    assert damaged_scales(scheme.format, views) == []


def test_packing_is_that_of_compressed_tensors():
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    torch.manual_seed(1)
    weight = torch.randn(64, 128)
    for form, bits, group in (("w4a16", 4, 32), ("w8a16", 8, 32)):
        packed, value = _QUANTISERS[form](weight)
        scale = packed["weight_scale"].float().repeat_interleave(group, 1)
        signed = torch.round(value / scale).to(torch.int8)
        assert torch.equal(packed["weight_packed"], helpers.pack_to_int32(signed, bits))


def test_rows_of_padding():
    for form in METHODS:
        scheme, _, _ = loaded(form)
        layout = ExpertLayout.pack(scheme.format.tensors(1536, 2048, 768))
        assert layout.row_bytes < 1.01 * layout.num_bytes
