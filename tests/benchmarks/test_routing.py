"""Where the benchmarks' tokens go, and that a replayed trace meets the simulator's slots."""

import pytest
import run
import torch
from requirements import same_hits
from routing import Skewed, TraceReplay, UniformOverSome
from timed_server import empty_slots
from traces import random_trace

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec

EXPERTS, LAYERS, TOP_K = 8, 3, 2


def ask(strategy, tokens, top_k=TOP_K):
    logits = torch.zeros(tokens, EXPERTS)
    return strategy.route_tokens(torch.zeros(tokens, 4), logits, top_k, torch.int32)


def test_uniform_routing_is_confined_and_set_free():
    strategy = UniformOverSome()
    weights, ids = ask(strategy, 200)
    assert set(ids.flatten().tolist()) == set(range(EXPERTS))
    assert weights.sum(1) == pytest.approx(torch.ones(200))
    strategy.confine(3)
    _, ids = ask(strategy, 200)
    assert set(ids.flatten().tolist()) == {0, 1, 2}
    assert bool((ids[:, 0] != ids[:, 1]).all())
    strategy.confine(None)
    assert set(ask(strategy, 200)[1].flatten().tolist()) == set(range(EXPERTS))


@pytest.mark.parametrize("exponent", [0.0, 0.8, 2.0])
def test_skewed_routing_falls_with_the_rank(exponent):
    torch.manual_seed(0)
    tokens = 40_000
    weights, ids = ask(Skewed(exponent), tokens, top_k=1)
    expected = torch.arange(1, EXPERTS + 1, dtype=torch.float64) ** -exponent
    expected /= expected.sum()
    counts = torch.bincount(ids.flatten(), minlength=EXPERTS)
    deviation = (tokens * expected * (1 - expected)).sqrt()
    assert bool(((counts - tokens * expected).abs() < 5 * deviation).all())
    assert bool((weights == 1).all())


def test_skewed_routing_chooses_nobody_twice_and_anew_in_every_step():
    torch.manual_seed(0)
    strategy = Skewed()
    weights, ids = ask(strategy, 300, top_k=3)
    assert bool((ids.sort(1).values.diff(dim=1) > 0).all())
    assert weights.sum(1) == pytest.approx(torch.ones(300))
    assert not torch.equal(ids, ask(strategy, 300, top_k=3)[1])


def test_a_trace_goes_on_from_step_to_step():
    ids_NLK = torch.arange(5 * LAYERS * TOP_K).view(5, LAYERS, TOP_K) % EXPERTS
    strategy = TraceReplay(ids_NLK)

    def step(tokens):
        return torch.stack([ask(strategy, tokens)[1] for _ in range(LAYERS)], 1)

    assert torch.equal(step(2), ids_NLK[:2].int())
    assert torch.equal(step(1), ids_NLK[2:3].int())
    assert strategy.position == 3
    assert torch.equal(step(4), ids_NLK[[3, 4, 0, 1]].int())
    strategy.rewind()
    assert torch.equal(step(1), ids_NLK[:1].int())


def test_a_trace_of_another_model_is_refused():
    with pytest.raises(AssertionError, match="2 experts a token, the model 4"):
        ask(TraceReplay(torch.zeros(5, LAYERS, TOP_K, dtype=torch.int64)), 1, top_k=4)


def engine_for(trace, share):
    layout = ExpertLayout.pack(
        [("w13_weight", (8, 4), torch.float32), ("w2_weight", (4, 4), torch.float32)]
    )
    engine = OffloadEngine(MoeOffloadConfig.parse({"cache_fraction": share}), torch.device("cpu"))
    for layer in range(trace.num_layers):
        spec = LayerSpec(f"{layer}", trace.num_experts, layout, Activation("silu"))
        engine.add_layer(spec)[1].rows_EB.zero_()
    engine.plan()
    engine.finish_loading()
    return engine


def test_an_emptied_engine_hits_what_the_simulator_says(tmp_path):
    trace = random_trace(3, tokens=60, layers=LAYERS, experts=EXPERTS, top_k=TOP_K)
    trace.save(tmp_path / "trace.npz")
    replayed = 20
    ids_NLK = torch.from_numpy(trace.expert_ids.astype("int32"))
    rows = []
    for share in (0.5, 0.25):
        engine, strategy = engine_for(trace, share), TraceReplay(ids_NLK[:replayed])

        def steps(count, engine=engine, strategy=strategy):
            for _ in range(count):
                for layer in range(LAYERS):
                    weights, ids = ask(strategy, 1)
                    engine.run(layer, torch.zeros(1, 4), weights, ids)

        steps(3)  # a warm-up that leaves residents behind
        empty_slots(engine)
        strategy.rewind()
        assert engine.stats().resident == engine.stats().active == 0
        engine.check_integrity()
        steps(replayed)
        stats = engine.stats()
        rows.append({"case": "trace", "share": share, "hits": stats.hits, "active": stats.active})
    simulated = run.simulated_hits(tmp_path / "trace.npz", replayed)
    assert same_hits(rows, simulated)["passed"]
    assert not same_hits([{**rows[0], "hits": rows[0]["hits"] + 1}, rows[1]], simulated)["passed"]
    assert same_hits(rows[:1], simulated)["passed"] is None
    assert same_hits([rows[0], rows[0]], simulated)["passed"] is None


def test_a_trace_is_scrambled_and_restored():
    ids_NLK = torch.arange(5 * LAYERS * TOP_K, dtype=torch.int32).view(5, LAYERS, TOP_K) % EXPERTS
    strategy = TraceReplay(ids_NLK)
    strategy.scramble(None)

    def step(tokens):
        strategy.rewind()
        return torch.stack([ask(strategy, tokens)[1] for _ in range(LAYERS)], 1)

    assert torch.equal(step(5), ids_NLK)
    strategy.scramble(0)
    scrambled = step(5)
    assert not torch.equal(scrambled, ids_NLK.int())
    assert bool((scrambled[..., 0] != scrambled[..., 1]).all())
    assert torch.equal(step(5), scrambled)
    strategy.scramble(1)
    assert not torch.equal(step(5), scrambled)
    strategy.scramble(None)
    assert torch.equal(step(5), ids_NLK.int())
