"""The control of prefetch against made-up machines."""

import random

import pytest

from vllm_moe_offload import prefetch_control as module
from vllm_moe_offload.prefetch_control import (
    LEARNING_STEPS,
    OFF,
    STEPS_OF_TRIAL,
    STEPS_OFF,
    STEPS_ON,
    PrefetchControl,
    StepCost,
)

LAYERS, ROW = 10, 1e-3


class Machine:
    """Takes a time for a step that depends on the rows; costs come some steps late.

    A share ``stalls`` of the steps takes ten times as long, whatever they do.
    """

    def __init__(self, seconds, *, compute=2.4 * ROW, misses=2, late=3, noise=0.002, tokens=None,
                 stalls=0.0, seed=1):  # fmt: skip
        self.lines = []
        self.control = PrefetchControl(LAYERS, ROW, self.lines.append)
        self.seconds, self.compute, self.misses = seconds, compute, misses
        self.tokens = tokens or (lambda step: 1)
        self.late, self.noise = late, noise
        self.stalls, self.random = stalls, random.Random(seed)
        self.step, self.moved, self.costs, self.rows = 0, 0, [], []

    def run(self, steps):
        for _ in range(steps):
            if len(self.costs) >= self.late:
                self.control.note(self.costs.pop(0))
            plan = self.control.plan()
            self.moved += LAYERS * self.misses
            base = LAYERS * (self.compute + self.misses * ROW)
            spread = 1 + self.random.uniform(-self.noise, self.noise)
            stalled = 10 if self.random.random() < self.stalls else 1
            taken = base * self.seconds(plan.rows) * spread * stalled
            moved = self.moved if plan.counts else None
            self.costs.append(StepCost(plan, self.tokens(self.step), taken, moved))
            self.rows.append(plan.rows)
            self.step += 1


def helps(rows):
    return 0.9 if rows > 0 else 1.0


def harms(rows):
    return 1.1 if rows > 0 else 1.0


TRIAL = LEARNING_STEPS + STEPS_OF_TRIAL + 10


def test_only_counts_while_predictors_learn():
    machine = Machine(helps)
    machine.run(LEARNING_STEPS)
    assert set(machine.rows) == {0}


def test_what_helps_is_switched_on():
    machine = Machine(helps)
    machine.run(TRIAL)
    assert machine.control.rows == 2
    (line,) = machine.lines
    assert line.startswith("prefetch is on: 2 experts a layer make steps 1")
    machine.run(STEPS_ON - 10)
    assert set(machine.rows[TRIAL:]) == {2}
    machine.run(2 * STEPS_ON)
    assert machine.control.rows == 2
    assert len(machine.lines) == 1


def test_what_harms_is_switched_off_and_tried_ever_more_seldom():
    machine = Machine(harms)
    machine.run(TRIAL)
    assert machine.control.rows == OFF
    (line,) = machine.lines
    assert line.startswith("prefetch is off: it would change the time of a step by +")
    machine.run(40 * STEPS_OFF)
    assert len(machine.lines) == 1
    fetching = [step for step, rows in enumerate(machine.rows) if rows > 0 and step > TRIAL]
    assert 0 < len(fetching) < 0.005 * len(machine.rows)


def test_useless_prefetch_costs_little_in_the_long_run():
    machine = Machine(harms)
    machine.run(20_000)
    total = sum(harms(rows) for rows in machine.rows) / len(machine.rows)
    assert total < 1.01


@pytest.mark.parametrize(("seconds", "rows"), [(helps, 2), (harms, OFF)])
def test_a_host_that_stalls_now_and_then_decides_nothing(seconds, rows):
    for seed in range(20):
        machine = Machine(seconds, noise=0.05, stalls=0.01, seed=seed)
        machine.run(TRIAL + STEPS_OFF + TRIAL)
        assert machine.control.rows == rows
        assert len(machine.lines) == 1


def test_a_change_is_noticed_both_ways():
    machine = Machine(helps)
    machine.run(TRIAL)
    machine.seconds = harms
    machine.run(STEPS_ON + TRIAL)
    assert machine.control.rows == OFF
    machine.seconds = helps
    machine.run(STEPS_OFF + TRIAL)
    assert machine.control.rows == 2
    assert [line.split(":")[0] for line in machine.lines] == [
        "prefetch is on", "prefetch is off", "prefetch is on",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("compute", "rows"), [(0.2 * ROW, 0), (0.6 * ROW, 1), (1.4 * ROW, 1), (5.5 * ROW, 5)]
)
def test_no_more_rows_than_computation_hides(compute, rows):
    machine = Machine(helps, compute=compute, noise=0)
    machine.run(TRIAL)
    assert max(machine.rows) == rows
    assert machine.control.rows == (rows or OFF)
    if not rows:
        assert "hides no transfer" in machine.lines[0]


def test_small_gains_do_not_switch_it_on_but_let_it_stay():
    machine = Machine(lambda rows: 0.998 if rows > 0 else 1.0, noise=0)
    machine.run(TRIAL)
    assert machine.control.rows == OFF
    machine = Machine(helps, noise=0)
    machine.run(TRIAL)
    machine.seconds = lambda rows: 1.002 if rows > 0 else 1.0
    machine.run(STEPS_ON + TRIAL)
    assert machine.control.rows == 2


def test_batches_that_change_all_the_time_tell_nothing():
    machine = Machine(harms, tokens=lambda step: step % 5)
    machine.run(TRIAL + 3 * STEPS_OFF)
    assert machine.lines == []
    assert machine.control.rows == 0


def test_batches_that_change_now_and_then_are_left_out():
    machine = Machine(helps, tokens=lambda step: 1 if step % 100 < 90 else 2, noise=0)
    machine.run(TRIAL)
    assert machine.control.rows == 2


def test_a_trial_is_long_enough_to_compare():
    assert module.LEAST_PAIRS <= module.PAIRS - 1, "the first pair fetches nothing"
