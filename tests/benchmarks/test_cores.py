"""Which cores repeats run on."""

import os

import pytest
from cores import on_core
from timed_server import MAX_REPEATS, quickest


def test_repeats_are_spread_over_the_cores(monkeypatch):
    current = [set(range(4, 10))]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: current[0])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: current.__setitem__(0, cores))
    seen = []
    for number in range(4):
        with on_core(number, of=3):
            seen.append(set(current[0]))
        assert set(current[0]) == set(range(4, 10))
    assert seen == [{4}, {6}, {8}, {4}]


def fail_on_one_core():
    with on_core(0, of=1):
        assert len(os.sched_getaffinity(0)) == 1
        raise ValueError("broken")


def test_a_core_is_left_after_a_failure():
    before = os.sched_getaffinity(0)
    with pytest.raises(ValueError, match="broken"):
        fail_on_one_core()
    assert os.sched_getaffinity(0) == before


def test_the_quickest_of_all_repeats_counts():
    times = iter(range(2 * MAX_REPEATS, 0, -1))
    row = quickest(lambda: {"seconds": float(next(times))})
    assert row["seconds"] == MAX_REPEATS + 1
    assert len(row["repeats_seconds"]) == MAX_REPEATS
