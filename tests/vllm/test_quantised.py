"""Quantised checkpoints through the plugin, against stock vLLM on what their codes mean.

Experts are decoded to float32 inside the products, so that the plugin on a quantised checkpoint
and stock vLLM on the decoded one differ by the order of float32 sums alone. Where a format rounds
activations as well, that is switched off for this comparison.
"""

import json
import shutil

import pytest
from reference import PROMPTS
from safetensors.torch import load_file, save_file
from served import engine, generate, offloaded, tokens

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.plan.checkpoint import read_checkpoint
from vllm_moe_offload.plan.model import describe
from vllm_moe_offload.quantised_checkpoints import FORMATS, quantise_checkpoint

MAX_TOKENS = 12
TOLERANCE = 1e-4
pytestmark = pytest.mark.usefixtures("float32_allowed")


def family_of(form):
    return "gpt_oss" if form == "mxfp4" else "qwen3_moe"


@pytest.fixture(scope="session")
def quantised(checkpoint, tmp_path_factory):
    """Makes the twins of a checkpoint in a format, once a session."""
    made = {}

    def make(form, *, decoded=False):
        if (form, decoded) not in made:
            source = checkpoint(family_of(form), num_layers=2, intermediate_size=128)
            path = tmp_path_factory.mktemp(form)
            made[form, decoded] = quantise_checkpoint(source, path, form, decoded=decoded)
        return made[form, decoded]

    return make


def run(path, form, share, **kwargs):
    with engine(path, family_of(form), **offloaded(cache_fraction=share), **kwargs) as llm:
        generations = generate(llm, PROMPTS, MAX_TOKENS)
        (stats,) = llm.collective_rpc("moe_offload_stats")
    return generations, stats


def planned_pool(path):
    """Bytes of the pool by the checkpoint's headers alone."""
    layers = describe(read_checkpoint(str(path))).layers
    return sum(layer.num_experts * layer.row_bytes(4) for layer in layers)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("unrounded")
def test_same_tokens_as_stock_vllm_on_the_decoded_weights(quantised, form):
    with engine(quantised(form, decoded=True), family_of(form)) as llm:
        expected = generate(llm, PROMPTS, MAX_TOKENS)
    actual, stats = run(quantised(form), form, 0.25)
    assert stats["misses"] > 0
    if not form.startswith(("w", "gptq", "awq")):  # their scales have the served type, here wide
        assert stats["pool_bytes"] == planned_pool(quantised(form))
    assert tokens(actual) == tokens(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("form", ["fp8", "fp8-channel", "fp8-tensor", "w4a16", "mxfp4"])
def test_the_same_bits_whatever_is_resident(quantised, form):
    results = [run(quantised(form), form, share) for share in (0.0, 0.25, 1.0)]
    assert results[0][0] == results[1][0] == results[2][0]
    assert results[0][1]["hits"] == 0 < results[1][1]["hits"]


@pytest.mark.parametrize(("form", "bits"), [("fp8", 8), ("w4a16", 4), ("mxfp4", 4)])
def test_a_miss_moves_the_bits_of_the_checkpoint(quantised, form, bits):
    _, stats = run(quantised(form), form, 0.0)
    # A tiny expert fills few pages: the scales, and what is left of the last page.
    codes = 3 * 128 * 128 * bits // 8
    assert codes <= stats["bytes_moved"] / stats["misses"] < codes * 1.1 + 8192


def test_fp8_rounds_activations(quantised, monkeypatch):
    from vllm_moe_offload import layer

    rounded, _ = run(quantised("fp8"), "fp8", 1.0)
    monkeypatch.setattr(layer, "_multiplies_e4m3", lambda _: False)
    exact, _ = run(quantised("fp8"), "fp8", 1.0)
    apart = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(rounded, exact, strict=True)]
    # Steps of e4m3 are an eighth of a value at most, and many errors of both signs add up.
    assert 1e-4 < max(apart) < 0.5


@pytest.mark.parametrize("form", ["fp8", "w4a16"])
def test_dummy_weights(quantised, form, monkeypatch):
    from vllm_moe_offload import layer

    monkeypatch.setattr(layer, "damaged_weights", lambda _: pytest.fail("nothing was loaded"))
    with engine(quantised(form), family_of(form), load_format="dummy", **offloaded()) as llm:
        assert len(tokens(generate(llm, PROMPTS, 4))[0]) == 4


def refusal(path, form, **kwargs):
    with (
        pytest.raises(OffloadError) as error,
        engine(path, family_of(form), **offloaded(), **kwargs),
    ):
        pass
    return str(error.value)


def copy_with(source, target, change=None, **quantization):
    """A checkpoint with other tensors or another quantisation config."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] |= quantization
    (target / "config.json").write_text(json.dumps(config))
    for file in target.glob("*.safetensors") if change else ():
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("form", "name", "value", "problem"),
    [
        ("fp8", "weight", float("nan"), "NaN"),
        ("fp8", "weight_scale_inv", float("nan"), "NaN"),
        ("fp8", "weight_scale_inv", -1.0, "a negative value"),
        ("fp8", "weight_scale_inv", 0.0, "zero over weights"),
        ("w4a16", "weight_scale", float("inf"), "infinity"),
        ("nvfp4", "weight_scale_2", float("nan"), "NaN"),
    ],
)
def test_damaged_values(quantised, tmp_path, form, name, value, problem):
    damaged = f"model.layers.1.mlp.experts.3.down_proj.{name}"
    where = []

    def damage(tensors):
        if damaged in tensors:
            tensors[damaged] = tensors[damaged].clone()
            tensors[damaged].view(-1)[0] = value
            where.append(damaged)

    message = refusal(copy_with(quantised(form), tmp_path, damage), form)
    assert where == [damaged]
    assert damaged in message
    assert ".safetensors" in message
    assert problem in message


def test_missing_scale(quantised, tmp_path, monkeypatch):
    from vllm_moe_offload.patches import admission

    monkeypatch.setattr(admission, "check_checkpoint", lambda _: None)
    missing = "model.layers.1.mlp.experts.3.up_proj.weight_packed"
    message = refusal(
        copy_with(quantised("w4a16"), tmp_path, lambda tensors: tensors.pop(missing, None)),
        "w4a16",
    )
    assert missing in message


def test_missing_codes_of_a_transposed_format(quantised, tmp_path, monkeypatch):
    from vllm_moe_offload.patches import admission

    monkeypatch.setattr(admission, "check_checkpoint", lambda _: None)
    missing = "model.layers.1.mlp.experts.3.up_proj.qweight"
    message = refusal(
        copy_with(quantised("gptq"), tmp_path, lambda tensors: tensors.pop(missing, None)), "gptq"
    )
    assert missing in message


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
def test_act_order(quantised, tmp_path):
    path = copy_with(quantised("gptq"), tmp_path, desc_act=True)
    with (
        pytest.raises(ValueError, match=r"desc_act|act.?order"),
        engine(path, "qwen3_moe", **offloaded()),
    ):
        pass


@pytest.mark.usefixtures("no_weights_loaded")
def test_quantised_while_loading(checkpoint):
    message = refusal(checkpoint("qwen3_moe"), "qwen3_moe", quantization="fp8", dtype="bfloat16")
    assert "quantization = " in message
    assert "OnlineMoEMethod" in message
    assert "MXFP4" in message, "what works is listed"
