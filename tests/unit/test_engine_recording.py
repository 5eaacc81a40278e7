"""What an engine keeps for a recorder, and slots that are filled before the first step.

Legend: T tokens, K choices a token, E local experts, S slots.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.resolve import ResidencyTables
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing
from vllm_moe_offload.residency import Residency
from vllm_moe_offload.sweep import Sweep

HOST = torch.device("cpu")
HIDDEN, TOP_K, MAX_TOKENS = 16, 2, 80
LAYOUT = ExpertLayout.pack(
    [("w13_weight", (16, HIDDEN), torch.float32), ("w2_weight", (HIDDEN, 8), torch.float32)]
)


def build(routings, *, log_tokens=0, share=0.5) -> OffloadEngine:
    options = {"cache_fraction": share, "staging_mb": 4 * LAYOUT.row_bytes / 2**20}
    config = MoeOffloadConfig.parse(options)
    engine = OffloadEngine(config, HOST, log_tokens=log_tokens)
    for number, routing in enumerate(routings):
        spec = LayerSpec(
            str(number), len(routing.id_of_E), LAYOUT, Activation("silu"), routing=routing
        )
        engine.add_layer(spec)
    engine.plan()
    for segment in engine.pool.segments:
        segment.rows_EB.random_(generator=torch.Generator().manual_seed(0))
        for view in segment.views().values():
            view.normal_(generator=torch.Generator().manual_seed(1))
    engine.finish_loading()
    engine.arena.buffer.fill_(255)
    return engine


def all_local(experts=8):
    return Routing(experts, TOP_K, tuple(range(experts)))


def run(engine, layer, ids_TK, chosen_TK=None):
    tokens = len(ids_TK)
    x_TH, weight_TK = torch.ones(tokens, HIDDEN), torch.ones(tokens, TOP_K)
    return engine.run(layer, x_TH, weight_TK, ids_TK, chosen_TK)


@pytest.mark.parametrize("tokens", [0, 1, 9, MAX_TOKENS])
@pytest.mark.parametrize("sweeps", [False, True])
def test_log_holds_the_last_step(tokens, sweeps, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    engine = build([all_local()] * 3, log_tokens=MAX_TOKENS)
    if sweeps:
        rows = [segment.rows_EB for segment in engine.pool.segments]
        engine._sweep = Sweep(engine._layers, rows, HOST)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        ids_LTK = torch.randint(-1, 8, (3, tokens, TOP_K), generator=generator)
        for layer in range(3):
            run(engine, layer, ids_LTK[layer])
    log = engine.step_log.tokens(tokens)
    assert log.dtype == torch.int16
    assert torch.equal(log, ids_LTK.transpose(0, 1).short())


def test_log_holds_what_the_router_chose():
    engine = build([Routing(20, TOP_K, (3, 7, 11, 19))], log_tokens=4)
    chosen_TK = torch.tensor([[3, 4], [19, 7], [0, 1]])
    local_TK = torch.tensor([[0, -1], [3, 1], [-1, -1]])
    run(engine, 0, local_TK, chosen_TK)
    assert torch.equal(engine.step_log.tokens(3)[:, 0], chosen_TK.short())


def test_log_takes_no_more_than_it_has_room_for():
    engine = build([all_local()] * 2, log_tokens=3)
    ids_TK = torch.arange(10).view(5, 2) % 8
    engine.step_log.ids_LTK.fill_(-5)
    run(engine, 0, ids_TK)
    assert torch.equal(engine.step_log.ids_LTK[0], ids_TK[:3].short())
    assert bool((engine.step_log.ids_LTK[1] == -5).all())


def test_no_log_unless_asked_for():
    engine = build([all_local()])
    run(engine, 0, torch.tensor([[0, 1]]))
    assert engine.step_log is None
    assert all(layer.log_TK is None for layer in engine._layers)


@pytest.mark.parametrize(
    ("routings", "problem"),
    [
        ([all_local(), Routing(8, 3, tuple(range(8)))], r"numbers of experts a token: \[2, 3\]"),
        ([Routing(40_000, 2, (0, 1, 2))], "more than 32768 experts"),
    ],
)
def test_models_that_cannot_be_logged(routings, problem):
    build(routings)
    with pytest.raises(OffloadError, match=problem) as error:
        build(routings, log_tokens=4)
    assert "Drop trace_path" in str(error.value)


def test_a_router_that_chooses_another_number():
    engine = build([all_local()], log_tokens=4)
    with pytest.raises(OffloadError, match="3 experts a token where its configuration says 2"):
        engine.run(0, torch.ones(1, HIDDEN), torch.ones(1, 3), torch.tensor([[0, 1, 2]]))


@given(st.data())
def test_filled_slots_hold_the_hottest(data):
    experts = data.draw(st.integers(1, 9))
    slots = data.draw(st.integers(0, experts))
    scores = st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=20, max_size=20)
    ids = data.draw(st.permutations(range(20)))[:experts]
    routing = Routing(20, TOP_K, tuple(sorted(ids)))
    engine = build([routing, routing], share=slots / experts)
    score_LE = np.array([data.draw(scores), data.draw(scores)])
    run(engine, 0, torch.zeros(1, TOP_K, dtype=torch.int64))
    filled = engine.fill_slots(score_LE)
    engine.check_integrity()
    total = 0
    for layer in range(2):
        tables = engine.residency(layer).tables
        local = score_LE[layer, list(routing.id_of_E)]
        ranked = [e for e in np.argsort(-local, kind="stable").tolist() if local[e] > 0][:slots]
        held = tables.expert_of_S.tolist()
        assert sorted(e for e in held if e >= 0) == sorted(ranked)
        stamps = [int(tables.stamp_S[tables.slot_of_E[e]]) for e in ranked]
        assert stamps == sorted(stamps, reverse=True), "the hottest goes last"
        assert len(set(stamps)) == len(stamps)
        total += len(ranked)
    assert filled == total == engine.stats().resident


def test_filling_counts_what_it_moves():
    engine = build([all_local()])
    engine.fill_slots(np.arange(8.0)[None])
    stats = engine.stats()
    assert stats.bytes_moved == 4 * LAYOUT.row_bytes
    assert (stats.active, stats.misses) == (0, 0)


def test_filled_slots_are_hits_and_give_the_same_bits():
    cold, warm = build([all_local()]), build([all_local()])
    warm.fill_slots(np.array([[0, 0, 9, 8, 7, 1, 0, 0.5]]))
    ids_TK = torch.tensor([[2, 3], [4, 5]])
    assert torch.equal(run(cold, 0, ids_TK), run(warm, 0, ids_TK))
    assert (warm.stats().hits, cold.stats().hits) == (4, 0)
    warm.check_integrity()


def test_the_coldest_of_those_filled_goes_first():
    engine = build([all_local()])
    engine.fill_slots(np.array([[0, 0, 9, 8, 7, 1, 0, 0.5]]))
    run(engine, 0, torch.tensor([[0, 0]]))
    assert sorted(engine.residency(0).tables.expert_of_S.tolist()) == [0, 2, 3, 4]


def test_no_more_experts_than_slots():
    with pytest.raises(AssertionError, match="3 experts, 2 slots"):
        Residency(ResidencyTables.empty(4, 2, HOST)).fill(
            torch.tensor([0, 1, 2], dtype=torch.int32)
        )
