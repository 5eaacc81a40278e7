"""The plugin against vLLM without it, with the same settings."""

import pytest
from reference import PROMPTS
from served import engine, generate, generate_in_subprocess, offloaded, tokens

EXPERTS, TOP_K = 16, 4
MAX_TOKENS = 12
BATCH = [[3 + (31 * i + 7 * n) % 500 for i in range(length)]
         for n, length in enumerate((1, 2, 5, 9, 31, 64, 90, 150))]  # fmt: skip
SCHEDULING = {
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
}


@pytest.fixture(scope="module")
def path(checkpoint):
    return checkpoint("qwen3_moe", num_experts=EXPERTS, top_k=TOP_K)


@pytest.fixture(scope="module")
def stock(path):
    with engine(path, "qwen3_moe", **SCHEDULING) as llm:
        return [generate(llm, BATCH, MAX_TOKENS), generate(llm, BATCH[::-1], MAX_TOKENS)]


@pytest.fixture(scope="module")
def seen():
    """Results of all capacities so far, which must be the same to the last bit."""
    return []


@pytest.mark.parametrize("slots", [0, 1, TOP_K - 1, TOP_K, EXPERTS // 2, EXPERTS])
def test_any_capacity_gives_the_same_tokens(path, stock, seen, slots):
    options = offloaded(cache_fraction=slots / EXPERTS)
    with engine(path, "qwen3_moe", **SCHEDULING, **options) as llm:
        # The second pass finds prefixes of the first in vLLM's cache.
        results = [generate(llm, BATCH, MAX_TOKENS), generate(llm, BATCH[::-1], MAX_TOKENS)]
        (stats,) = llm.collective_rpc("moe_offload_stats")
    assert [tokens(r) for r in results] == [tokens(r) for r in stock]
    assert stats["slots"] == slots * stats["layers"]
    assert stats["hits"] + stats["misses"] == stats["active"] > 0
    seen.append(results)
    assert results == seen[0]


@pytest.mark.parametrize("policy", ["adaptive", "lru"])
def test_any_policy_gives_the_same_tokens(path, stock, policy):
    options = offloaded(cache_fraction=0.5, policy=policy)
    with engine(path, "qwen3_moe", **SCHEDULING, **options) as llm:
        assert tokens(generate(llm, BATCH, MAX_TOKENS)) == tokens(stock[0])
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        (offload,) = worker.moe_offload_engines
        offload.check_integrity()
        (stats,) = llm.collective_rpc("moe_offload_stats")
    assert stats["misses"] > stats["slots"], "nobody was evicted"


def test_staging_of_one_expert_gives_the_same_tokens(path, stock):
    # 16 experts of 96 KiB: two blocks of one row each.
    options = offloaded(cache_fraction=1 / EXPERTS, staging_mb=0.1875)
    with engine(path, "qwen3_moe", **SCHEDULING, **options) as llm:
        assert tokens(generate(llm, BATCH, MAX_TOKENS)) == tokens(stock[0])


def test_only_some_layers(path, stock):
    options = offloaded(cache_fraction=0.25, layers="1,3")
    with engine(path, "qwen3_moe", **SCHEDULING, **options) as llm:
        (stats,) = llm.collective_rpc("moe_offload_stats")
        assert stats["layers"] == 2
        assert tokens(generate(llm, BATCH, MAX_TOKENS)) == tokens(stock[0])


def test_tensor_parallel_over_two_processes(checkpoint):
    path = checkpoint("qwen2_moe")
    settings = {"tensor_parallel_size": 2}
    stock = generate_in_subprocess(path, "qwen2_moe", PROMPTS, 16, **settings)
    settings |= offloaded(cache_fraction=0.25)
    assert tokens(generate_in_subprocess(path, "qwen2_moe", PROMPTS, 16, **settings)) == tokens(
        stock
    )


def test_torch_compile(checkpoint):
    path = checkpoint("deepseek_v2")
    stock = generate_in_subprocess(path, "deepseek_v2", PROMPTS, 16)
    compiled = generate_in_subprocess(
        path,
        "deepseek_v2",
        PROMPTS,
        16,
        environment={"TORCHDYNAMO_DISABLE": "0"},
        enforce_eager=False,
        **offloaded(cache_fraction=0.25),
    )
    assert tokens(compiled) == tokens(stock)


def test_dummy_weights(path, monkeypatch):
    from vllm_moe_offload import layer

    monkeypatch.setattr(layer, "damaged_weights", lambda _: pytest.fail("nothing was loaded"))
    with engine(path, "qwen3_moe", load_format="dummy", **offloaded(cache_fraction=0.5)) as llm:
        assert len(tokens(generate(llm, PROMPTS, 4))[0]) == 4
        ours = llm.apply_model(_expert_weights)
    with engine(path, "qwen3_moe", load_format="dummy") as llm:
        assert ours == llm.apply_model(_expert_weights)


def _expert_weights(model):
    experts = {n: w for n, w in model.named_parameters() if n.endswith(("w13_weight", "w2_weight"))}
    assert experts
    assert all(w.count_nonzero() > w.numel() // 2 for w in experts.values())
    return {name: w.double().sum().item() for name, w in experts.items()}
