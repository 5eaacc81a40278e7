"""Experts that borrow from the KV cache of a real vLLM.

vLLM's CPU backend names one layout, in which the layers of a block lie apart. Its kernels address
blocks by their stride all the same, so here they are told to do so: the same scheduler, worker,
runner, cache and kernels, in the layout that experts need.
"""

from unittest import mock

import pytest
import sharing
from served import engine, offloaded
from sharing import check, poisoned_moves, prompts, serve, worker_of

from vllm_moe_offload.patches import lending

SHAPE = {"num_experts": 16, "num_layers": 4}
PROMPTS = prompts(16, 60)
TOKENS = 90


@pytest.fixture(scope="module")
def path(checkpoint):
    return checkpoint("qwen3_moe", **SHAPE)


@pytest.fixture(scope="module")
def layers_side_by_side():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    from vllm.v1.kv_cache_layout import KVCacheLayout

    layouts = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
    with mock.patch.object(CPUAttentionBackend, "supported_kv_cache_layouts", return_value=layouts):
        yield


def settings(path, **options):
    return {"block_size": 32, "kv_cache_memory_bytes": 8 << 20, **offloaded(**options)}


@pytest.fixture(scope="module")
def fixed_answers(path, layers_side_by_side):
    with engine(path, "qwen3_moe", **settings(path, kv_policy="fixed", kv_floor=0.8)) as llm:
        (offload,) = worker_of(llm).moe_offload_engines
        assert 0 < offload.borrower.boundary.max_increments < SHAPE["num_experts"]
        answers = serve(llm, PROMPTS, TOKENS)
        check(llm)
        assert offload.borrower._follower.number == 1, "a fixed split moved"
    return answers


@pytest.fixture(scope="module")
def answers_of_an_arena(path):
    """With slots of their own, and the layout that vLLM prefers."""
    with engine(path, "qwen3_moe", **settings(path, cache_fraction=0.25)) as llm:
        (offload,) = worker_of(llm).moe_offload_engines
        assert not offload.borrows
        return serve(llm, PROMPTS, TOKENS)


def test_borrowed_slots_change_no_bit(fixed_answers, answers_of_an_arena):
    assert fixed_answers == answers_of_an_arena


def test_moves_change_no_bit(path, fixed_answers, monkeypatch):
    monkeypatch.setattr(lending, "_policy", sharing.restless)
    with poisoned_moves() as watch, engine(path, "qwen3_moe", **settings(path)) as llm:
        answers = serve(llm, PROMPTS, TOKENS, check_every=1)
        answers_again = serve(llm, PROMPTS, TOKENS, start=100)
        check(llm)
        stats = llm.collective_rpc("moe_offload_stats")[0]
    assert answers == fixed_answers
    assert [tokens for tokens, _ in answers_again] == [tokens for tokens, _ in fixed_answers]
    assert watch.moves >= 200
    assert len(set(watch.increments)) > 8
    assert stats["misses"] > stats["slots"], "experts came back into slots that had closed"
