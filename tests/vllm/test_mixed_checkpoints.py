"""Every group size and strategy of the formats, against stock vLLM on what the codes mean."""

import pytest
from mixed_checkpoints import COMPRESSED, GPTQ, awq_of, fp8_of, mixed_compressed, mixed_gptq
from reference import PROMPTS
from served import engine, generate, tokens
from shares import by_share

MAX_TOKENS = 8
TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("float32_allowed", "unrounded")


STORED = {
    "GPTQ": (mixed_gptq, len(GPTQ)),
    "compressed-tensors": (mixed_compressed, len(COMPRESSED)),
    **{f"AWQ, groups of {group}": (awq_of(group), 1) for group in (64, 128)},
    **{f"fp8 by tensors, {kind}": (fp8_of(kind), 1) for kind in ("static", "dynamic")},
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
