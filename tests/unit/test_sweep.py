"""What a sweep copies, in which order, and what it computes; here copies are immediate."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing
from vllm_moe_offload.sweep import Sweep, Wave, plan_waves

HIDDEN, INTERMEDIATE = 16, 8
EXPERTS = (6, 4, 7)

tables = st.lists(st.lists(st.integers(-1, 3).map(lambda s: min(s, 1)), max_size=9), max_size=4)


@st.composite
def plans(draw):
    slot_of_LE = draw(tables)
    rows = [draw(st.integers(1, 4)) for _ in slot_of_LE]
    return slot_of_LE, rows, draw(st.integers(0, len(slot_of_LE)))


@given(plans())
def test_every_absent_expert_streams_once_in_order(plan):
    slot_of_LE, block_rows, first_layer = plan
    waves = plan_waves(slot_of_LE, block_rows, first_layer)
    streamed = [(wave.layer, expert) for wave in waves for expert in wave.experts]
    assert streamed == [
        (layer, expert)
        for layer in range(first_layer, len(slot_of_LE))
        for expert, slot in enumerate(slot_of_LE[layer])
        if slot == -1
    ]
    assert all(1 <= len(wave.experts) <= block_rows[wave.layer] for wave in waves)


@given(plans())
def test_waves_are_as_full_as_they_can_be(plan):
    slot_of_LE, block_rows, first_layer = plan
    waves = plan_waves(slot_of_LE, block_rows, first_layer)
    for layer in range(first_layer, len(slot_of_LE)):
        sizes = [len(wave.experts) for wave in waves if wave.layer == layer]
        assert all(size == block_rows[layer] for size in sizes[:-1])


def test_a_resident_layer_needs_no_rows():
    assert plan_waves([[0, 1], [-1, 0]], [0, 2], 0) == [Wave(1, (0,))]


@given(st.sets(st.integers(0, 20), min_size=1))
def test_runs_are_the_wave(experts):
    wave = Wave(0, tuple(sorted(experts)))
    copied = {
        row + i: expert + i for expert, row, length in wave.runs() for i in range(length)
    }  # fmt: skip
    assert copied == dict(enumerate(wave.experts))


@given(st.sets(st.integers(0, 20), min_size=1))
def test_runs_are_as_long_as_they_can_be(experts):
    runs = list(Wave(0, tuple(sorted(experts))).runs())
    for (expert, _, length), (following, *_) in pairwise(runs):
        assert expert + length < following


def build(share: float) -> OffloadEngine:
    """Three layers of different sizes; staging holds four experts, a sweep's blocks one."""
    layout = ExpertLayout.pack(
        [
            ("w13_weight", (2 * INTERMEDIATE, HIDDEN), torch.float32),
            ("w2_weight", (HIDDEN, INTERMEDIATE), torch.float32),
        ]
    )
    options = {"cache_fraction": share, "staging_mb": 4 * layout.row_bytes / 2**20}
    engine = OffloadEngine(MoeOffloadConfig.parse(options), torch.device("cpu"))
    for number, experts in enumerate(EXPERTS):
        routing = Routing(experts, 3, tuple(range(experts)))
        spec = LayerSpec(str(number), experts, layout, Activation("silu"), routing=routing)
        engine.add_layer(spec)
    engine.plan()
    generator = torch.Generator().manual_seed(0)
    for segment in engine.pool.segments:
        for view in segment.views().values():
            view.normal_(generator=generator)
    engine.finish_loading()
    engine.arena.buffer.fill_(255)  # NaN in every slot
    engine.staging.buffer.fill_(255)
    return engine


def inputs(step: int, layer: int):
    generator = torch.Generator().manual_seed(100 * step + layer)
    x_TH = torch.randn(9, HIDDEN, generator=generator)
    ids_TK = torch.randint(-1, EXPERTS[layer], (9, 3), generator=generator)
    return x_TH, torch.rand(9, 3, generator=generator), ids_TK


def sweep_of(engine: OffloadEngine) -> Sweep:
    rows = [segment.rows_EB for segment in engine.pool.segments]
    return Sweep(engine._layers, rows, engine.device)


def assert_consistent(engine: OffloadEngine) -> None:
    engine.check_integrity()
    stats = engine.stats()
    assert stats.active == stats.hits + stats.misses
    row = engine.specs[0].layout.row_bytes
    assert stats.bytes_moved % row == 0
    assert stats.bytes_moved >= stats.misses * row


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_a_sweep_gives_the_bits_of_ordinary_steps(share):
    swept, stepped = build(share), build(share)
    sweep = sweep_of(swept)
    for step in range(3):
        for layer in range(len(EXPERTS)):
            tensors = inputs(step, layer)
            expected = stepped.run(layer, *tensors)
            assert torch.equal(sweep.run(layer, *tensors), expected)
            assert_consistent(swept)


def test_a_sweep_fills_empty_slots_and_evicts_nobody():
    engine = build(0.5)
    sweep = sweep_of(engine)
    for layer in range(len(EXPERTS)):
        sweep.run(layer, *inputs(0, layer))
    before = [engine.residency(layer).tables.expert_of_S.clone() for layer in range(3)]
    assert engine.stats().resident == engine.stats().slots
    for layer in range(len(EXPERTS)):
        sweep.run(layer, *inputs(1, layer))
    after = [engine.residency(layer).tables.expert_of_S for layer in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_absent_expert_is_counted_once_a_step():
    engine = build(0.5)
    sweep = sweep_of(engine)
    for layer in range(len(EXPERTS)):
        sweep.run(layer, *inputs(0, layer))
    engine.reset_stats()
    for layer in range(len(EXPERTS)):
        sweep.run(layer, *inputs(1, layer))
    absent = sum(EXPERTS) - engine.stats().slots
    assert engine.stats().bytes_moved == absent * engine.specs[0].layout.row_bytes


def test_a_sweep_left_half_way_starts_anew():
    engine, other = build(0.3), build(0.3)
    sweep = sweep_of(engine)
    sweep.run(0, *inputs(0, 0))
    sweep.settle()  # an ordinary step comes between
    engine.run(1, *inputs(1, 1))
    for layer in range(len(EXPERTS)):
        tensors = inputs(2, layer)
        assert torch.equal(sweep.run(layer, *tensors), other.run(layer, *tensors))
    assert_consistent(engine)


def test_a_sweep_may_begin_at_any_layer():
    engine, other = build(0.3), build(0.3)
    sweep = sweep_of(engine)
    for layer in (1, 2, 0, 2):
        tensors = inputs(0, layer)
        assert torch.equal(sweep.run(layer, *tensors), other.run(layer, *tensors))


def begun(sweep: Sweep) -> set[int]:
    """Layers whose experts are in staging ahead of their computation."""
    return {wave.layer for wave in sweep._waves[sweep._done : sweep._issued]}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_copies_begin_before_the_first_layer_and_follow_the_last(share):
    engine, other = build(share), build(share)
    sweep = sweep_of(engine)
    sweep.begin()
    for step in range(3):
        sweep.begin()  # follow has done it already
        assert share == 1.0 or begun(sweep) == {0}
        for layer in range(len(EXPERTS)):
            tensors = inputs(step, layer)
            assert torch.equal(sweep.run(layer, *tensors), other.run(layer, *tensors))
        assert begun(sweep) == set()
        sweep.follow()
    sweep.settle()
    assert_consistent(engine)


def test_nothing_follows_a_part_of_a_step():
    engine = build(0.3)
    sweep = sweep_of(engine)
    sweep.follow()
    assert begun(sweep) == set()
    sweep.run(0, *inputs(0, 0))
    sweep.follow()
    assert begun(sweep) != {0}
    for layer in (1, 2):
        sweep.run(layer, *inputs(0, layer))
    sweep.settle()  # residency may change from here on
    sweep.follow()
    assert begun(sweep) == set()
    for layer in (1, 2):  # from the second layer on is not a whole step
        sweep.run(layer, *inputs(1, layer))
    sweep.follow()
    assert begun(sweep) == set()


def test_copies_of_no_use_are_counted():
    engine = build(0.3)
    sweep = sweep_of(engine)
    for layer in range(len(EXPERTS)):
        sweep.run(layer, *inputs(0, layer))
    sweep.follow()
    engine.reset_stats()
    ahead = sweep._issued
    sweep.settle()
    assert ahead == 4  # blocks of one expert
    assert engine.stats().bytes_moved == ahead * engine.specs[0].layout.row_bytes


def test_an_engine_looks_ahead_where_it_is_sure_of_a_sweep():
    engine = build(0.3)
    engine._sweep = sweep = sweep_of(engine)
    sure = -(-16 * max(EXPERTS) // 3)  # tokens that make 16 pairs an expert
    for tokens in (0, sure - 1):
        engine.step_begins(tokens)
        assert begun(sweep) == set()
    engine.step_begins(sure)
    assert begun(sweep) == {0}
    engine.step_begins(0)
    assert begun(sweep) == set()
    engine.step_begins(sure)
    for layer in range(len(EXPERTS)):
        sweep.run(layer, *inputs(0, layer))
    engine.step_ended(sure - 1)
    assert begun(sweep) == set()
    engine.step_ended(sure)
    assert begun(sweep) == {0}
