"""Every group size and strategy of the formats, against stock vLLM on what the codes mean."""

import pytest
from mixed_checkpoints import COMPRESSED, GPTQ, mixed_compressed, mixed_gptq
from reference import PROMPTS
from served import engine, generate, tokens
from shares import by_share

from vllm_moe_offload.quantised_checkpoints import awq, quantise_experts

MAX_TOKENS = 8
TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("float32_allowed", "unrounded")


def store_awq(group):
    """AWQ knows one group size a checkpoint."""
    quantise = awq(group)

    def store(source, path, *, decoded):
        def configure(skipped):
            return {
                "quant_method": "awq", "bits": 4, "group_size": group or -1, "zero_point": True,
                "version": "gemm", "modules_to_not_convert": skipped,
            }  # fmt: skip

        return quantise_experts(
            source, path, lambda _, weight: quantise(weight), configure, decoded=decoded
        )

    return store


STORED = {
    "GPTQ": (mixed_gptq, len(GPTQ)),
    "compressed-tensors": (mixed_compressed, len(COMPRESSED)),
    **{f"AWQ, groups of {group}": (store_awq(group), 1) for group in (64, 128)},
}
"""How to store a checkpoint, and its layers."""


@pytest.mark.parametrize("kind", STORED)
def test_same_tokens_as_stock_vllm_on_the_decoded_weights(checkpoint, tmp_path, kind):
    store, layers = STORED[kind]
    source = checkpoint(
        "qwen3_moe", num_layers=layers, hidden_size=256, intermediate_size=256, num_experts=4
    )
    stored = store(source, tmp_path / "stored", decoded=False)
    decoded = store(source, tmp_path / "decoded", decoded=True)
    with engine(decoded, "qwen3_moe") as llm:
        expected = generate(llm, PROMPTS, MAX_TOKENS)
    shares = (0.0, 0.25, 1.0)
    results = [answers for answers, _ in by_share(stored, "qwen3_moe", shares, MAX_TOKENS)]
    assert results[0] == results[1] == results[2]
    assert tokens(results[0]) == tokens(expected)
    for mine, theirs in zip(results[0], expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=TOLERANCE)
