"""Checkpoints of quantised experts with something wrong, refused by the name of what it is."""

import json
import re

import pytest
import torch
from quantised import changed, copy_with, family_of
from served import engine, offloaded

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.patches import admission

pytestmark = pytest.mark.usefixtures("float32_allowed")

EXPERT = "model.layers.1.mlp.experts.3."
FIRST = "model.layers.0.mlp.experts.0."


def refusal(path, form, **kwargs):
    with (
        pytest.raises(OffloadError) as error,
        engine(path, family_of(form), **offloaded(), **kwargs),
    ):
        pass
    return str(error.value)


@pytest.mark.parametrize(
    ("form", "name", "value", "problem"),
    [
        ("fp8", "weight", float("nan"), "NaN"),
        ("fp8", "weight_scale_inv", float("nan"), "NaN"),
        ("fp8", "weight_scale_inv", -1.0, "a negative value"),
        ("fp8", "weight_scale_inv", 0.0, "zero over weights"),
        ("fp8-tensor", "input_scale", float("nan"), "nan"),
        ("fp8-tensor", "input_scale", -0.05, "-0.05"),
        ("fp8-tensor", "input_scale", 0.0, "it holds 0"),
        ("w4a16", "weight_scale", float("inf"), "infinity"),
        ("nvfp4", "weight_scale_2", float("nan"), "NaN"),
        ("nvfp4-packed", "weight_global_scale", 0.0, "infinity"),
        ("mxfp4-by-expert", "weight_scale", 255, "NaN"),
    ],
)
def test_damaged_values(quantised, tmp_path, form, name, value, problem):
    damaged = f"{EXPERT}down_proj.{name}"

    def damage(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    message = refusal(copy_with(quantised(form), tmp_path, changed(damaged, damage)), form)
    assert damaged in message
    assert ".safetensors" in message
    assert problem in message


def fewer(axis):
    """Every other value along an axis."""
    return lambda tensor: tensor[(slice(None),) * axis + (slice(None, None, 2),)]


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [
        ("fp8", "down_proj.weight_scale_inv", lambda t: t.repeat(2, 2)),
        ("fp8-tensor", "down_proj.weight_scale", lambda t: t.repeat(128)),
        ("fp8-channel", "down_proj.weight_scale", lambda t: t[:1]),
        ("w4a16", "up_proj.weight_scale", fewer(1)),
        ("w4a16", "gate_proj.weight_scale", lambda t: t.repeat_interleave(2, 1)),
        ("w4a16", "down_proj.weight_packed", fewer(1)),
        ("w4a16-zeros", "down_proj.weight_zero_point", fewer(1)),
        ("gptq", "down_proj.scales", fewer(0)),
        ("awq", "down_proj.qzeros", fewer(0)),
        ("nvfp4", "down_proj.weight_scale", fewer(1)),
        ("mxfp4-by-expert", "down_proj.weight_scale", fewer(1)),
    ],
)
def test_a_tensor_of_another_size(quantised, tmp_path, form, name, value):
    """The loaders of vLLM would take what there is, and leave the rest as it was."""
    path = copy_with(quantised(form), tmp_path, changed(EXPERT + name, value))
    message = refusal(path, form)
    assert EXPERT + name in message
    assert "the model's sizes and quantization_config ask for" in message
    assert "config.json" in message


def test_stacked_scales_of_another_size(quantised, tmp_path):
    change = changed("gate_up_proj_scales", fewer(2))
    message = refusal(copy_with(quantised("mxfp4"), tmp_path, change), "mxfp4")
    assert "layers.0.mlp.experts" in message
    assert "w13_weight_scale" in message
    assert "the model's sizes and quantization_config ask for" in message


def test_groups_of_another_size_than_the_config_says(quantised, tmp_path):
    message = refusal(copy_with(quantised("gptq"), tmp_path, group_size=64), "gptq")
    assert FIRST in message
    assert "config.json" in message


@pytest.mark.parametrize(
    ("form", "ending", "named"),
    [
        ("w4a16", EXPERT + "up_proj.weight_packed", EXPERT + "up_proj.weight_packed"),
        ("gptq", EXPERT + "up_proj.qweight", EXPERT + "up_proj.qweight"),
        # Of all experts, as after a conversion that lost them.
        ("fp8", ".weight_scale_inv", FIRST + "gate_proj.weight_scale_inv"),
        ("fp8", "up_proj.weight_scale_inv", FIRST + "up_proj.weight_scale_inv"),
        ("fp8-tensor", ".input_scale", FIRST + "gate_proj.input_scale"),
        ("w4a16-zeros", ".weight_zero_point", FIRST + "gate_proj.weight_zero_point"),
        ("awq", ".qzeros", FIRST + "gate_proj.qzeros"),
        ("nvfp4", ".weight_scale_2", FIRST + "gate_proj.weight_scale_2"),
        ("mxfp4", "gate_up_proj_scales", FIRST + "gate_proj.weight_scale"),
    ],
)
def test_missing_tensors(quantised, tmp_path, monkeypatch, form, ending, named):
    """Found after loading, whatever the headers say."""
    monkeypatch.setattr(admission, "check_checkpoint", lambda _: None)
    path = copy_with(quantised(form), tmp_path, changed(ending, lambda _: None))
    message = refusal(path, form)
    assert "missing" in message
    assert named in message


@pytest.fixture
def no_weights_loaded(monkeypatch):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def fail(*_args, **_kwargs):
        pytest.fail("weights were loaded before the refusal")

    monkeypatch.setattr(DefaultModelLoader, "load_weights", fail)


def with_group(path, size):
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = size
    return {"config_groups": config["quantization_config"]["config_groups"]}


@pytest.mark.usefixtures("no_weights_loaded")
@pytest.mark.parametrize("size", [48, 256])
def test_group_that_does_not_divide(quantised, tmp_path, size):
    source = quantised("w4a16")
    message = refusal(copy_with(source, tmp_path, **with_group(source, size)), "w4a16")
    assert "model.layers.0.mlp.experts" in message
    assert str(size) in message
    assert "MXFP4" in message, "what works is listed"


@pytest.mark.usefixtures("no_weights_loaded")
@pytest.mark.parametrize(("form", "size"), [("gptq", 48), ("awq", 48), ("awq", -1)])
def test_group_that_does_not_divide_in_other_formats(quantised, tmp_path, form, size):
    message = refusal(copy_with(quantised(form), tmp_path, group_size=size), form)
    assert "model.layers.0.mlp.experts" in message
    assert "MXFP4" in message, "what works is listed"


@pytest.mark.usefixtures("no_weights_loaded")
@pytest.mark.parametrize(
    ("form", "setting", "named"),
    [
        ("gptq", {"desc_act": True}, r"auto_gptq.*activation ordering \(desc_act=True\)"),
        ("gptq", {"sym": False}, r"auto_gptq.*sym=False"),
        ("gptq", {"bits": 3}, r"auto_gptq.*bits=3"),
        ("awq", {"zero_point": False}, r"zero_point = false.*mlp\.experts"),
        ("fp8", {"activation_scheme": "static"}, r"fp8.*static activation"),
        ("nvfp4", {"quant_algo": "MXFP8"}, "ModelOptMxFp8FusedMoE"),
        ("fp8", {"quant_method": "gguf"}, "gguf"),
        ("fp8", {"quant_method": "quark"}, "quark.*export"),
    ],
)
def test_other_formats(quantised, tmp_path, form, setting, named):
    message = refusal(copy_with(quantised(form), tmp_path, **setting), form, dtype="bfloat16")
    assert re.search(f"quantization = {named}", message), message
    assert "MXFP4" in message, "what works is listed"


@pytest.mark.usefixtures("no_weights_loaded")
def test_act_order_that_the_config_denies(quantised, tmp_path):
    torch.manual_seed(0)
    change = changed(".g_idx", lambda t: t[torch.randperm(len(t))])
    message = refusal(copy_with(quantised("gptq"), tmp_path, change), "gptq")
    assert FIRST in message
    assert "act-order" in message
    assert "desc_act" in message


@pytest.mark.usefixtures("no_weights_loaded")
def test_quantised_while_loading(checkpoint):
    message = refusal(checkpoint("qwen3_moe"), "qwen3_moe", quantization="fp8", dtype="bfloat16")
    assert "quantization = " in message
    assert "OnlineMoEMethod" in message
    assert "MXFP4" in message, "what works is listed"
