"""Engines that predict and fetch ahead: the same bits, whole tables, and what they count.

Legend: T tokens, K choices a token, L layers, E experts, H hidden size.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing
from vllm_moe_offload.prefetch import MAX_TOKENS
from vllm_moe_offload.prefetch_control import OFF

HOST = torch.device("cpu")
MIB = 1 << 20
LAYERS, EXPERTS, TOP_K, HIDDEN, COLUMNS = 4, 12, 2, 16, 8
ROW = ExpertLayout.pack([("w13_weight", (2 * COLUMNS, HIDDEN), torch.float32),
                         ("w2_weight", (HIDDEN, COLUMNS), torch.float32)])  # fmt: skip
PREDICTORS = ("gate", "markov", "eam")
SUCCESSOR = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(5))


def routers():
    weights = torch.randn(LAYERS, EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(9))
    return [lambda x_TH, w=weight: x_TH @ w.T for weight in weights]


def make(specs=None, rows=None, say=None, **options) -> OffloadEngine:
    """An engine of random experts; ``rows`` experts may be fetched a layer."""
    if rows is not None:
        options["prefetch_mb"] = rows * ROW.row_bytes / MIB
    engine = OffloadEngine(MoeOffloadConfig.parse(options), HOST, say=say)
    generator = torch.Generator().manual_seed(1)
    for spec in specs or [spec_of(n) for n in range(LAYERS)]:
        _, segment = engine.add_layer(spec)
        for view in segment.views().values():
            view.copy_(torch.randn(view.shape, generator=generator))
    engine.routers = routers()
    engine.plan()
    engine.finish_loading()
    return engine


def spec_of(number: int, experts: int = EXPERTS, top_k: int | None = TOP_K) -> LayerSpec:
    routing = None if top_k is None else Routing(experts, top_k, tuple(range(experts)))
    return LayerSpec(f"layer {number}", experts, ROW, Activation("silu"), routing=routing)


def inputs(tokens: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, HIDDEN, generator=generator),
        torch.rand(tokens, TOP_K, generator=generator),
    )


def step(engine, ids_LTK, seed=0) -> list[torch.Tensor]:
    engine.step_begins(0, ids_LTK.shape[1])
    results = []
    for layer, ids_TK in enumerate(ids_LTK):
        results.append(engine.run(layer, *inputs(ids_TK.shape[0], seed + layer), ids_TK))
    engine.step_ended(0)
    return results


def uniform(tokens: int, seed: int, inactive: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(LAYERS, tokens, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    return ids.masked_fill(torch.rand(ids.shape, generator=generator) < inactive, -1)


def certain(tokens: int, seed: int) -> torch.Tensor:
    """Routing in which every layer follows from the one before it."""
    ids_TK = uniform(tokens, seed)[0]
    found = [ids_TK]
    for _ in range(LAYERS - 1):
        found.append(SUCCESSOR[found[-1]])
    return torch.stack(found)


@pytest.mark.parametrize("predictor", PREDICTORS)
@settings(max_examples=40)
@given(
    policy=st.sampled_from(("lru", "adaptive")),
    slots=st.integers(0, EXPERTS),
    rows=st.sampled_from((0, 1, 3, 40)),
    steps=st.lists(
        st.tuples(
            st.sampled_from((0, 1, 1, 2, 5, 33, 100, MAX_TOKENS + 1)),
            st.sampled_from((0.0, 0.0, 0.3, 1.0)),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 999),
)
def test_the_same_bits(predictor, policy, slots, rows, steps, seed):
    share = slots / EXPERTS
    engine = make(rows=rows, predictor=predictor, policy=policy, cache_fraction=share)
    plain = make(cache_fraction=1)
    for number, (tokens, inactive) in enumerate(steps):
        ids_LTK = uniform(tokens, seed + number, inactive)
        expected = step(plain, ids_LTK, number)
        engine.step_begins(0, tokens)
        for layer, ids_TK in enumerate(ids_LTK):
            y_TH = engine.run(layer, *inputs(tokens, number + layer), ids_TK)
            assert torch.equal(y_TH, expected[layer])
            engine.check_integrity()
        engine.step_ended(0)
    stats = engine.stats()
    assert stats.hits + stats.misses == stats.active == plain.stats().active
    moved = stats.misses + stats.prefetched
    assert stats.bytes_moved == moved * ROW.row_bytes
    assert stats.prefetch_hits <= stats.prefetched
    assert stats.resident <= slots * LAYERS
    if rows == 0 or slots == 0:
        assert stats.prefetched == 0


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_layers_out_of_turn(predictor):
    engine = make(rows=2, predictor=predictor, cache_fraction=0.5)
    plain = make(cache_fraction=1)
    for number, layer in enumerate((2, 0, 1, 1, 3, 3, 0, 2, 3)):
        ids_TK = uniform(3, number)[layer]
        arguments = (layer, *inputs(3, number), ids_TK)
        assert torch.equal(engine.run(*arguments), plain.run(*arguments))
        engine.check_integrity()


def test_what_can_be_foreseen_is_fetched_before_it_is_asked_for():
    with_prefetch = make(rows=TOP_K, predictor="markov", cache_fraction=0.5, policy="lru")
    without = make(cache_fraction=0.5, policy="lru")
    for number in range(600):
        step(with_prefetch, certain(1, number))
        step(without, certain(1, number))
    with_prefetch.reset_stats()
    without.reset_stats()
    for number in range(600, 700):
        step(with_prefetch, certain(1, number))
        step(without, certain(1, number))
    found, plain = with_prefetch.stats(), without.stats()
    # Nobody foresees the first layer.
    first, *layers = with_prefetch.layer_counts()
    first = first.loads
    assert found.misses - first < 0.4 * (plain.misses - first)
    assert found.prefetch_hits > 0.95 * found.prefetched
    assert found.bytes_moved <= 1.05 * plain.bytes_moved
    for layer in layers:
        assert layer.coverage > 0.8
        assert layer.foreseeable == 100 * TOP_K


def test_a_gate_that_is_right_covers_everything():
    engine = make(rows=0, predictor="gate", cache_fraction=0.5)
    for number in range(20):
        x_TH, weight_TK = inputs(3, number)
        engine.step_begins(0, 3)
        for layer, router in enumerate(routers()):
            ids_TK = router(x_TH).topk(TOP_K).indices
            engine.run(layer, x_TH, weight_TK, ids_TK)
        engine.step_ended(0)
    for layer in engine.layer_counts()[1:]:
        # Two tokens may want the same expert, so as many guesses as this layer reads miss some.
        assert layer.coverage > 0.8
    assert engine.stats().prefetched == 0


def test_useless_guesses_are_bounded_and_go_first():
    engine = make(rows=1, predictor="markov", cache_fraction=0.25)
    for number in range(100):
        step(engine, uniform(1, number))
    stats = engine.stats()
    assert 0 < stats.prefetched <= 100 * (LAYERS - 1)
    engine.check_integrity()


def test_a_layer_may_be_the_end_of_a_graph():
    joins = []
    engine = make(rows=2, predictor="markov", cache_fraction=0.5)
    engine._prefetch._spans_layers = lambda: False
    engine._prefetch._beside.join = lambda: joins.append(1)
    step(engine, uniform(1, 0))
    assert len(joins) == 2 * LAYERS
    engine._prefetch._spans_layers = lambda: True
    step(engine, uniform(1, 0))
    assert len(joins) == 3 * LAYERS


def test_control_sets_the_rows_and_is_told_what_steps_take():
    lines = []
    engine = make(predictor="markov", cache_fraction=0.5, say=lines.append)
    prefetch = engine._prefetch
    noted = []
    original = prefetch._control.note
    prefetch._control.note = lambda cost: (noted.append(cost), original(cost))
    prefetch._control._idle_steps = 3
    seen = set()
    for number in range(260):
        step(engine, uniform(1, number))
        seen.add(int(prefetch._outlook.rows))
    assert [cost.plan.place for cost in noted[:5]] == [-1, -1, -1, 0, 1]
    assert noted[4].moved > 0
    assert all(cost.tokens == 1 and cost.seconds > 0 for cost in noted)
    assert {0, OFF} <= seen
    assert len(lines) == 1
    assert lines[0].startswith("prefetch is o")


def test_options_that_do_not_fit_the_layers():
    with pytest.raises(OffloadError, match="there is only one"):
        make([spec_of(0)], predictor="markov", cache_fraction=0.5)
    for other in (spec_of(1, experts=8), spec_of(1, top_k=3), spec_of(1, top_k=None)):
        with pytest.raises(OffloadError, match="the layers differ"):
            make([spec_of(0), other], predictor="eam", cache_fraction=0.5)
    with pytest.raises(OffloadError, match=r"one expert takes 4 KiB"):
        make(predictor="eam", prefetch_mb=1e-4, cache_fraction=0.5)
    engine = OffloadEngine(MoeOffloadConfig.parse({"predictor": "gate"}), HOST)
    for number in range(2):
        engine.add_layer(spec_of(number))
    with pytest.raises(OffloadError, match=r"routers of this model.*Give markov, eam or none"):
        engine.plan()
