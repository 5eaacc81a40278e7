"""When learners are asked, and what becomes of one that fails."""

import threading

import numpy as np
import pytest
from recording import wait_for

from vllm_moe_offload.recorder.learners import Learners


class Learner:
    """Learns in memory that can go away."""

    def __init__(self):
        self.learned, self.is_there, self.asked = 0, True, 0

    def section(self):
        self.asked += 1
        if not self.is_there:
            raise RuntimeError("an illegal memory access was encountered")
        return {"a": np.array([self.learned])}


@pytest.fixture
def lines():
    return []


@pytest.fixture
def learner():
    return Learner()


@pytest.fixture
def learners(learner, lines):
    return Learners({"one": learner.section}, lines.append)


def told(learners):
    return {name: section["a"].tolist() for name, section in learners.sections().items()}


def test_each_time_they_are_asked_anew(learners, learner):
    for learner.learned in (3, 4):
        assert told(learners) == {"one": [learner.learned]}


def test_nobody_is_asked_at_rest(learners, learner, lines):
    learner.learned = 3
    learners.rest()
    learner.is_there = False
    learners.rest()
    assert told(learners) == told(learners) == {"one": [3]}
    assert (learner.asked, lines) == (1, [])


def test_they_are_asked_again_when_awake(learners, learner):
    learners.rest()
    learner.learned = 5
    learners.wake()
    assert told(learners) == {"one": [5]}
    learner.learned = 6
    learners.rest()
    learner.is_there = False
    assert told(learners) == {"one": [6]}


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyError, AssertionError])
def test_one_that_fails_is_reported_and_others_are_asked(learner, lines, error):
    def fail():
        raise error("broken")

    learners = Learners({"bad": fail, "one": learner.section}, lines.append)
    assert told(learners) == {"one": [0]}
    (line,) = lines
    assert line.startswith(f"cannot read what bad has learned: {error.__name__}: ")
    learners.rest()
    assert told(learners) == {"one": [0]}
    assert len(lines) == 2


def test_of_one_that_fails_the_last_is_kept(learners, learner, lines):
    learner.learned = 3
    told(learners)
    learner.learned, learner.is_there = 4, False
    assert told(learners) == {"one": [3]}
    assert lines == [
        "cannot read what one has learned: RuntimeError: an illegal memory access was encountered"
    ]
    learner.is_there = True
    assert told(learners) == {"one": [4]}


def test_rest_waits_for_who_is_asking_and_waking_for_nobody(learner, lines):
    asked, answer = threading.Event(), threading.Event()

    def slow():
        asked.set()
        assert answer.wait(20)
        return learner.section()

    learners = Learners({"one": slow}, lines.append)
    writer = threading.Thread(target=learners.sections)
    writer.start()
    assert asked.wait(20)
    learners.wake()
    resting = threading.Thread(target=learners.rest)
    resting.start()
    resting.join(0.2)
    assert resting.is_alive(), "memory may not go away while it is read"
    answer.set()
    for thread in (writer, resting):
        thread.join(20)
    wait_for(lambda: learner.asked == 2)
    assert lines == []
