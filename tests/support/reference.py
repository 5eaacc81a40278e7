"""Greedy generations by transformers, which the engine's output is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Of differing length, the last one longer than the sliding window of gpt_oss; no special tokens.
PROMPTS: list[list[int]] = [
    [3 + (97 * i * i + 41 * i + 29 * length) % 509 for i in range(length)]
    for length in (3, 8, 17, 40)
]


@dataclass(frozen=True)
class Generation:
    """The tokens generated for one prompt; all log-probabilities are natural logarithms."""

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]


def generate_reference(
    path: Path, prompts: Sequence[list[int]], max_tokens: int, dtype: str = "float32"
) -> list[Generation]:
    """Continue each prompt by exactly `max_tokens` tokens, ignoring the end of sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    return [_generate(model, prompt, max_tokens) for prompt in prompts]


def _generate(model, prompt: list[int], max_tokens: int) -> Generation:
    input_ids = torch.tensor([prompt])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        # Never produced. min_new_tokens would forbid the token instead, which vLLM does not do.
        eos_token_id=-1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    token_ids = output.sequences[0, len(prompt) :].tolist()
    logprobs = torch.cat(output.logits).float().log_softmax(-1)
    top = logprobs.topk(5)
    return Generation(
        token_ids,
        [logprobs[i, token].item() for i, token in enumerate(token_ids)],
        [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
    )
