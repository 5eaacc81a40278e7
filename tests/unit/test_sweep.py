"""What a sweep copies and in which order; the copies themselves need a GPU."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.sweep import Wave, plan_waves

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
