"""Batches padded as for CUDA graphs, in the real model runner."""

from dataclasses import replace

import pytest
from reference import PROMPTS
from served import engine, generate, offloaded, tokens

FAMILY = "qwen3_moe"
MULTIPLE = 16


@pytest.fixture
def padded(monkeypatch):
    """Lets the runner pad as it does for a graph of the next size up; how many rows it adds."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    added = []
    original = GPUModelRunner._determine_batch_execution_and_padding

    def pad(self, num_tokens, *args, **kwargs):
        mode, batch, *rest = original(self, num_tokens, *args, **kwargs)
        rows = -(-batch.num_tokens // MULTIPLE) * MULTIPLE
        added.append(rows - num_tokens)
        return mode, replace(batch, num_tokens=rows), *rest

    def switch_on():
        monkeypatch.setattr(GPUModelRunner, "_determine_batch_execution_and_padding", pad)
        return added

    return switch_on


def test_padding_asks_for_nothing(checkpoint, padded):
    found = []
    for pads in (False, True):
        options = offloaded(cache_fraction=0.25)
        with engine(checkpoint(FAMILY), FAMILY, **options, enable_prefix_caching=False) as llm:
            added = padded() if pads else []
            results = tokens(generate(llm, PROMPTS, 8, logprobs=None))
            (stats,) = llm.collective_rpc("moe_offload_stats")
            found.append((results, stats["active"], stats["hits"], stats["bytes_moved"]))
    assert sum(added) > 0
    assert found[0] == found[1]
