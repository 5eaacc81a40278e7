"""Quantised checkpoints through the plugin, against stock vLLM on what their codes mean.

Experts are decoded to float32 inside the products, so that the plugin on a quantised checkpoint
and stock vLLM on the decoded one differ by the order of float32 sums alone. Where a format rounds
activations as well, that is switched off for this comparison.
"""

import pytest
from quantised import family_of
from reference import PROMPTS
from safetensors.torch import load_file
from served import engine, generate, offloaded, tokens
from shares import by_share

from vllm_moe_offload import layer
from vllm_moe_offload.layout import ROW_ALIGNMENT, TENSOR_ALIGNMENT
from vllm_moe_offload.plan.checkpoint import read_checkpoint
from vllm_moe_offload.plan.model import describe
from vllm_moe_offload.quantised_checkpoints import (
    FORMATS,
    gptq,
    gptq_config,
    quantise_experts,
)
from vllm_moe_offload.schemes import _SCHEMES

MAX_TOKENS = 8
TOLERANCE = 1e-4
LAYERS, EXPERTS = 2, 8

pytestmark = pytest.mark.usefixtures("float32_allowed")


def run(path, form, share, **kwargs):
    with engine(path, family_of(form), **offloaded(cache_fraction=share), **kwargs) as llm:
        generations = generate(llm, PROMPTS, MAX_TOKENS)
        (stats,) = llm.collective_rpc("moe_offload_stats")
    return generations, stats


def planned_pool(path):
    """Bytes of the pool by the checkpoint's headers alone."""
    layers = describe(read_checkpoint(str(path))).layers
    return sum(layer.num_experts * layer.row_bytes(4) for layer in layers)


METHODS = {
    "fp8": "Fp8MoEMethod",
    **dict.fromkeys(("fp8-channel", "fp8-tensor"), "CompressedTensorsW8A8Fp8MoEMethod"),
    **dict.fromkeys(("w4a16", "w4a16-zeros", "w4a16-channel", "w8a16"),
                    "CompressedTensorsWNA16MoEMethod"),
    **dict.fromkeys(("gptq", "gptq-8bit"), "AutoGPTQMoEMethod"),
    "awq": "AutoAWQMoEMethod",
    "nvfp4": "ModelOptNvFp4FusedMoE",
    "nvfp4-packed": "CompressedTensorsW4A4Nvfp4MoEMethod",
    "mxfp4": "GptOssMxfp4MoEMethod",
    "mxfp4-by-expert": "Mxfp4MoEMethod",
}  # fmt: skip
"""vLLM's method for each format."""


def test_every_method_that_works_is_met():
    # The last one has a test of its own below.
    assert {*METHODS.values(), "MoeWNA16Method"} == set(_SCHEMES)
    assert tuple(sorted(METHODS)) == tuple(sorted(FORMATS))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.usefixtures("unrounded")
def test_same_tokens_as_stock_vllm_on_the_decoded_weights(quantised, form, monkeypatch):
    methods, original = set(), layer.scheme_of
    monkeypatch.setattr(
        layer, "scheme_of",
        lambda method, *args, **kw: methods.add(type(method).__name__)
        or original(method, *args, **kw),
    )  # fmt: skip
    with engine(quantised(form, decoded=True), family_of(form)) as llm:
        expected = generate(llm, PROMPTS, MAX_TOKENS)
    actual, stats = run(quantised(form), form, 0.25)
    assert methods == {METHODS[form]}
    assert stats["misses"] > 0
    if not form.startswith(("w", "gptq", "awq")):  # their scales have the served type, here wide
        assert stats["pool_bytes"] == planned_pool(quantised(form))
    assert tokens(actual) == tokens(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=TOLERANCE)


LEFT_OUT = ("g_idx", "weight_shape", "input_scale", "input_global_scale")
"""What checkpoints store beside the weights, and nobody multiplies by."""


def expert_bytes(path, form):
    """Bytes of an expert in the files, those left out that no row holds."""
    left_out = (*LEFT_OUT, "qzeros") if form.startswith("gptq") else LEFT_OUT
    total = 0
    for file in path.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if ".experts." in name and not name.endswith(left_out):
                total += tensor.nbytes
    return total / (LAYERS * EXPERTS)


@pytest.mark.parametrize("form", FORMATS)
def test_bits_and_bytes_whatever_is_resident(quantised, form):
    """In bfloat16, where scales have the size that they have in the checkpoint."""
    path = quantised(form)
    results = by_share(path, family_of(form), (0.0, 0.25, 1.0), MAX_TOKENS, dtype="bfloat16")
    assert results[0][0] == results[1][0] == results[2][0]
    assert results[0][1]["hits"] == 0 < results[1][1]["hits"]
    for _, stats in results[:2]:
        row_bytes = stats["pool_bytes"] / stats["experts_in_pool"]
        assert stats["misses"] > 0
        assert stats["bytes_moved"] == stats["misses"] * row_bytes
        # Tiny tensors, each at a place of its own in pages: of a real one it is less than 1 %.
        assert 0 <= row_bytes - expert_bytes(path, form) < ROW_ALIGNMENT + 10 * TENSOR_ALIGNMENT


@pytest.mark.parametrize("form", FORMATS)
def test_the_next_router_is_asked(quantised, form):
    """It is a layer like others, whatever the experts are stored in."""
    options = offloaded(cache_fraction=0.25, predictor="gate", prefetch_mb=0)
    with engine(quantised(form), family_of(form), **options) as llm:
        generate(llm, PROMPTS[:1], MAX_TOKENS, logprobs=None)
        (stats,) = llm.collective_rpc("moe_offload_stats")
    first, second = stats["by_layer"]
    assert first["guessed"] == 0 < second["guessed"]


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_through_vllms_other_method(checkpoint, tmp_path, bits):
    """``moe_wna16`` has another order of codes, made by vLLM while it loads."""
    source = checkpoint("qwen3_moe", num_layers=1, intermediate_size=128)
    quantise = gptq(bits)

    def configure(_skipped):
        config = gptq_config(bits, 32, [])
        return {**config, "dynamic": {r"-:.*(self_attn|lm_head|mlp\.gate).*": {}}}

    stored, decoded = (
        quantise_experts(source, tmp_path / str(d), lambda _, w: quantise(w), configure, decoded=d)
        for d in (False, True)
    )
    with engine(decoded, "qwen3_moe") as llm:
        expected = generate(llm, PROMPTS, MAX_TOKENS)
    actual, _ = run(stored, "gptq", 0.25, quantization="moe_wna16")
    assert tokens(actual) == tokens(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=TOLERANCE)


def test_fp8_rounds_activations(quantised, monkeypatch):
    rounded, _ = run(quantised("fp8"), "fp8", 1.0)
    monkeypatch.setattr(layer, "has_e4m3", lambda _: False)
    exact, _ = run(quantised("fp8"), "fp8", 1.0)
    apart = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(rounded, exact, strict=True)]
    # Steps of e4m3 are an eighth of a value at most, and many errors of both signs add up.
    assert 1e-4 < max(apart) < 0.5


@pytest.mark.parametrize("form", ["fp8", "w4a16"])
def test_dummy_weights(quantised, form, monkeypatch):
    monkeypatch.setattr(layer, "damaged_weights", lambda _: pytest.fail("nothing was loaded"))
    with engine(quantised(form), family_of(form), load_format="dummy", **offloaded()) as llm:
        assert len(tokens(generate(llm, PROMPTS, 4))[0]) == 4
