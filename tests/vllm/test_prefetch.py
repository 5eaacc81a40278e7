"""Predictors and prefetch in real vLLM engines: the same tokens, and what they report."""

import pytest
from reference import PROMPTS
from served import engine, generate, offloaded, tokens

EXPERTS, TOP_K, LAYERS, STEPS = 16, 4, 4, 12
SHARE = 0.5
EXPERT_MIB = 0.1
"""One expert of the checkpoint takes 96 KiB."""


@pytest.fixture(scope="module")
def path(checkpoint):
    return checkpoint("qwen3_moe", num_experts=EXPERTS, top_k=TOP_K)


@pytest.fixture(scope="module")
def without(path):
    with engine(path, "qwen3_moe", **offloaded(cache_fraction=SHARE)) as llm:
        found = generate(llm, PROMPTS, STEPS)
        (stats,) = llm.collective_rpc("moe_offload_stats")
    assert all(layer["coverage"] is None for layer in stats["by_layer"])
    return found


@pytest.mark.parametrize("predictor", ["gate", "markov", "eam"])
def test_same_results_and_coverage_by_layer(path, without, predictor):
    options = offloaded(cache_fraction=SHARE, predictor=predictor, prefetch_mb=2 * EXPERT_MIB)
    with engine(path, "qwen3_moe", **options) as llm:
        assert generate(llm, PROMPTS, STEPS) == without
        (stats,) = llm.collective_rpc("moe_offload_stats")
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        for offload in worker.moe_offload_engines:
            offload.check_integrity()
    first, *others = stats["by_layer"]
    assert first["coverage"] is None
    for layer in others:
        if predictor == "eam":
            continue  # No window of tokens is complete yet.
        assert layer["guessed"] > 0
        assert 0 < layer["coverage"] <= 1
    if predictor != "eam":
        assert 0 < stats["prefetch_hits"] <= stats["prefetched"]
    assert stats["hits"] + stats["misses"] == stats["active"]


def test_gate_foresees_more_than_chance(path):
    options = offloaded(cache_fraction=SHARE, predictor="gate", prefetch_mb=0)
    with engine(path, "qwen3_moe", **options) as llm:
        generate(llm, PROMPTS[:1], 40, logprobs=None)
        (stats,) = llm.collective_rpc("moe_offload_stats")
    assert stats["prefetched"] == 0
    guessed = sum(layer["found"] for layer in stats["by_layer"])
    asked = sum(layer["foreseeable"] for layer in stats["by_layer"])
    # Four guesses among sixteen find a quarter by chance.
    assert guessed / asked > 0.3


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "mixtral", "granite_moe"])
def test_routers_are_found(checkpoint, family):
    options = offloaded(cache_fraction=SHARE, predictor="gate")
    with engine(checkpoint(family), family, **options) as llm:
        found = tokens(generate(llm, PROMPTS, 4, logprobs=None))
        (stats,) = llm.collective_rpc("moe_offload_stats")
    assert len(found) == len(PROMPTS)
    assert all(layer["guessed"] > 0 for layer in stats["by_layer"][1:])


def predictor_of(llm):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    (offload,) = worker.moe_offload_engines
    return offload.predictor


def test_transitions_outlast_a_restart(path, without, tmp_path):
    options = offloaded(
        cache_fraction=SHARE, predictor="markov", prefetch_mb=EXPERT_MIB, trace_path=str(tmp_path)
    )
    with engine(path, "qwen3_moe", **options) as llm:
        assert int(predictor_of(llm).tables.tokens) == 0, "warm-up teaches nothing"
        generate(llm, PROMPTS, STEPS, logprobs=None)
        learned = predictor_of(llm).to_arrays()
        assert int(learned["tokens"][0]) > 0
    with engine(path, "qwen3_moe", **options) as llm:
        found = predictor_of(llm).to_arrays()
        assert all((found[name] == learned[name]).all() for name in learned)
        assert generate(llm, PROMPTS, STEPS) == without


def test_a_damaged_predictor_is_reported_and_starts_empty(path, tmp_path, monkeypatch):
    from vllm_moe_offload import npz
    from vllm_moe_offload.patches import recording

    said = []
    monkeypatch.setattr(recording.logger, "warning", lambda text, *args: said.append(text % args))
    options = offloaded(cache_fraction=SHARE, predictor="markov", trace_path=str(tmp_path))
    with engine(path, "qwen3_moe", **options) as llm:
        generate(llm, PROMPTS, STEPS, logprobs=None)
    file = tmp_path / "stage0.warm-start"
    arrays = npz.load(file, "", "")
    arrays["predictor_markov/count_LEE"] = arrays["predictor_markov/count_LEE"][:, :3]
    npz.save(file, arrays)
    assert said == []
    with engine(path, "qwen3_moe", **options) as llm:
        assert not any(array.any() for array in predictor_of(llm).to_arrays().values())
        generate(llm, PROMPTS[:1], 2, logprobs=None)
    (line,) = said
    assert "count_LEE" in line
    assert "The predictor starts empty" in line
    assert file.with_name(f"{file.name}.old").exists()
