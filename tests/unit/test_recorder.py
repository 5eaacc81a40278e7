"""The recorder from step to file, and what may happen on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import recording
import torch
from recording import EXPERTS, IDENTITY, LAYERS, Steps, recorded, wait_for

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.recorder import HotSet, StepRows, prepare_directory
from vllm_moe_offload.recorder import recorder as module
from vllm_moe_offload.recorder.complaints import Complaints
from vllm_moe_offload.trace import load_all
from vllm_moe_offload.warm_start import WarmStartFile

CHILD = Path(recording.__file__)


def child(*arguments, prefix=(), **options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [*prefix, sys.executable, "-P", CHILD, *map(str, arguments)], env=environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def finished(process):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    return out


@pytest.fixture
def lines():
    return []


@pytest.fixture
def make(tmp_path, lines):
    made = []

    def make(**options):
        made.append(Steps(tmp_path, warn=lines.append, **options))
        return made[-1]

    yield make
    for steps in made:
        steps.recorder.close()


def test_closing_writes_everything(make, tmp_path, lines):
    steps = make()
    steps.run(100)
    steps.recorder.close()
    steps.recorder.close()
    (trace,) = load_all(tmp_path)
    assert trace.expert_ids[:, 1, 1].tolist() == list(range(100))
    assert trace.is_decode.tolist() == [False] * 3 + [True] * 97
    assert (trace.num_sequences, trace.num_experts, trace.model) == (1, EXPERTS, "m")
    assert lines == []


def test_an_interval_writes_what_is_there(make, tmp_path):
    steps = make(interval_s=0.2)
    steps.run(10)
    wait_for(lambda: recorded(tmp_path) == list(range(10)))
    steps.run(5)
    wait_for(lambda: recorded(tmp_path) == list(range(15)))
    assert len(list(tmp_path.glob("*.npz"))) == 1
    assert WarmStartFile(steps.warm_start.path, IDENTITY).load() is not None


def test_an_idle_server_writes_nothing(make, tmp_path):
    steps = make(interval_s=0.1)
    steps.run(10)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    time.sleep(0.3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    time.sleep(0.5)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_warm_up_is_not_recorded(make, tmp_path):
    steps = make(start=False)
    steps.run(10)
    steps.recorder.settle()
    steps.recorder.close()
    assert list(tmp_path.iterdir()) == []
    steps.recorder.start(HotSet(LAYERS, EXPERTS), {})
    steps.position = 0
    steps.run(4)
    steps.recorder.close()
    assert recorded(tmp_path) == [0, 1, 2, 3]


def test_rotation(make, tmp_path):
    steps = make(file_bytes=100 * (LAYERS * 2 * 2 + 1))
    steps.run(250)
    steps.recorder.close()
    assert len(list(tmp_path.glob("*.npz"))) == 3
    assert recorded(tmp_path) == list(range(250))


def test_settling_empties_the_ring(make, monkeypatch):
    monkeypatch.setattr(module, "DRAIN_S", 60.0)
    steps = make()
    time.sleep(0.1)
    steps.run(10)
    assert steps.recorder._ring.waiting_bytes > 0
    steps.recorder.settle()
    assert steps.recorder._ring.waiting_bytes == 0


def test_steps_are_dropped_where_the_ring_is_full(make, tmp_path, lines, monkeypatch):
    monkeypatch.setattr(module, "DRAIN_S", 60.0)
    monkeypatch.setattr(module, "RING_BYTES", 256)
    steps = make()
    time.sleep(0.1)
    steps.run(25)
    steps.recorder.settle()
    steps.run(3)
    steps.recorder.close()
    assert recorded(tmp_path) == [*range(16), 25, 26, 27]
    assert steps.recorder.dropped_steps == 9
    (trace,) = load_all(tmp_path)
    assert np.diff(trace.sequence_starts).tolist() == [16, 3], "a gap splits the sequence"
    assert lines == ["moe-offload: not recorded so far: 9 steps that the ring had no room for."]


def test_a_sequence_that_begins_where_the_ring_is_full(make, tmp_path, lines, monkeypatch):
    monkeypatch.setattr(module, "DRAIN_S", 60.0)
    monkeypatch.setattr(module, "RING_BYTES", 256)
    steps = make()
    time.sleep(0.1)
    steps.run(16)
    steps.recorder.record(StepRows([1], [0], [1], begun=((1, 1),)), 1)
    steps.recorder.settle()
    steps.log.ids_LTK[:, :1] = 500
    steps.recorder.record(StepRows([1], [1], [1]), 1)
    steps.recorder.close()
    assert recorded(tmp_path) == [*range(16), 500]
    assert steps.recorder.dropped_steps == len(lines) == 1


def test_the_largest_steps_are_recorded_with_positions(make, tmp_path, lines, monkeypatch):
    """Wherever in the ring the step before ended."""
    monkeypatch.setattr(module, "RING_BYTES", 1)
    steps = make()
    largest = steps.log.max_tokens
    steps.log.ids_LTK[:] = torch.arange(largest)[:, None]
    start = 0
    for count in (1, largest, largest, 3, largest):
        begun = () if start else ((0, 100),)
        rows = StepRows([0], [0], [count], [0], begun)
        steps.recorder.record(rows, count, start + torch.arange(count))
        steps.recorder.settle()
        start += count
    steps.recorder.close()
    assert (steps.recorder.dropped_steps, lines) == (0, [])
    assert recorded(tmp_path) == [0, *range(8), *range(8), *range(3), *range(8)]


def test_goes_on_from_a_warm_start(make, tmp_path):
    before = HotSet(LAYERS, EXPERTS)
    before.score_LE[:, 7] = 100.0
    steps = make(start=False)
    steps.recorder.start(before, {"later": {"a": np.arange(3)}, "hot_set": {"stale": np.ones(1)}})
    steps.run(1)
    steps.recorder.close()
    found = WarmStartFile(steps.warm_start.path, IDENTITY).load()
    assert found["later"]["a"].tolist() == [0, 1, 2]
    assert list(found["hot_set"]) == ["score_LE"]
    assert found["hot_set"]["score_LE"][0, [0, 7, 8]] == pytest.approx([2, 100, 0], rel=1e-3)


def test_keeps_what_others_learn(make):
    steps = make(start=False)
    stale = {"predictor": {"a": np.zeros(3)}}
    steps.recorder.start(HotSet(LAYERS, EXPERTS), stale, {"predictor": lambda: {"a": np.arange(3)}})
    steps.run(1)
    steps.recorder.close()
    found = WarmStartFile(steps.warm_start.path, IDENTITY).load()
    assert found["predictor"]["a"].tolist() == [0, 1, 2]


class Learner:
    """Learns in memory that is not there while the worker sleeps."""

    def __init__(self):
        self.learned, self.is_there = 0, True

    def section(self):
        if not self.is_there:
            raise RuntimeError("an illegal memory access was encountered")
        return {"a": np.array([self.learned])}


def kept(steps):
    """What the warm start keeps of the learner, None as yet."""
    sections = WarmStartFile(steps.warm_start.path, IDENTITY).load() or {}
    return sections["learner"]["a"].tolist() if "learner" in sections else None


def test_what_was_learned_before_a_sleep_is_saved_in_it(make, tmp_path, lines):
    learner, steps = Learner(), make(start=False, interval_s=0.3)
    steps.recorder.start(HotSet(LAYERS, EXPERTS), {}, {"learner": learner.section})
    steps.run(3)
    learner.learned = 3
    steps.recorder.settle()
    learner.is_there = False
    wait_for(lambda: kept(steps) == [3])
    wait_for(lambda: recorded(tmp_path) == [0, 1, 2])
    assert lines == []


def test_a_sleeping_worker_is_not_asked_before_its_next_tokens(make, tmp_path, lines):
    learner, steps = Learner(), make(start=False, interval_s=0.2)
    steps.recorder.start(HotSet(LAYERS, EXPERTS), {}, {"learner": learner.section})
    steps.run(3)
    steps.recorder.settle()
    learner.is_there = False
    # A request that is aborted by then ends with a step of no tokens.
    steps.recorder.record(StepRows(ended=(7,)), 0)
    steps.recorder._has_learnt = True
    wait_for(lambda: not steps.recorder._has_learnt)
    assert (kept(steps), lines) == ([0], [])
    learner.is_there, learner.learned = True, 5
    steps.run(2)
    wait_for(lambda: kept(steps) == [5])
    learner.learned = 6
    steps.run(1)
    steps.recorder.settle()
    learner.is_there = False
    steps.recorder.close()
    assert (kept(steps), lines) == ([6], [])
    assert recorded(tmp_path) == list(range(6))


def test_a_learner_that_fails_is_reported_and_recording_goes_on(make, tmp_path, lines):
    learner, steps = Learner(), make(start=False, interval_s=0.2)
    learner.is_there = False
    stale = {"learner": {"a": np.array([9])}}
    steps.recorder.start(HotSet(LAYERS, EXPERTS), stale, {"learner": learner.section})
    steps.run(3)
    wait_for(lambda: lines)
    steps.recorder.settle()
    assert lines[0] == (
        "moe-offload: cannot read what learner has learned: "
        "RuntimeError: an illegal memory access was encountered."
    )
    wait_for(lambda: kept(steps) == [9])
    steps.run(2)
    wait_for(lambda: recorded(tmp_path) == list(range(5)))
    learner.is_there, learner.learned = True, 4
    steps.run(1)
    steps.recorder.close()
    assert kept(steps) == [4]
    assert recorded(tmp_path) == list(range(6))


def test_a_bug_ends_the_recording_and_nothing_else(make, tmp_path, lines):
    steps = make()
    steps.recorder.record(StepRows([5], [0], [1]), 1)  # a sequence that nobody began
    steps.recorder.settle()
    steps.recorder._work.set()
    wait_for(lambda: lines)
    steps.run(5)
    steps.recorder.close()
    assert lines[0].startswith("moe-offload: recording has ended: KeyError: 5")


def test_kill_loses_at_most_the_last_interval(tmp_path):
    process = child("run_until_killed", tmp_path)
    counts = []
    stop = time.monotonic() + 20
    while time.monotonic() < stop and (not counts or counts[-1][1] - counts[0][1] < 3.0):
        tokens, moment = process.stdout.readline().split()
        counts.append((int(tokens), float(moment)))
    process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert errors == ""
    found = recorded(tmp_path)
    assert found == [position % EXPERTS for position in range(len(found))]
    assert len(list(tmp_path.glob("*.npz"))) > 2, "files are rotated on the way"
    # An interval, the time from the ring to the thread, and what a busy machine adds.
    slack = 0.5 + module.DRAIN_S + 1.0
    old = max(tokens for tokens, moment in counts if moment < killed - slack)
    assert len(found) >= old > 0


def test_leaving_without_closing_writes_everything(tmp_path):
    finished(child("run_and_exit", tmp_path))
    assert recorded(tmp_path) == list(range(50))


def can_mount():
    attempt = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(attempt, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_full_disk(tmp_path, kind):
    prefix = ()
    if kind == "tmpfs":
        if not can_mount():
            pytest.skip("this system lets nobody mount; the other case covers the code")
        mount = f'mount -t tmpfs -o size=256k none {tmp_path} && exec "$@"'
        prefix = ("unshare", "-rm", "sh", "-c", mount, "sh")
    seen = json.loads(finished(child("run_on_a_full_disk", tmp_path, kind, prefix=prefix)))
    assert seen["before"] == 300
    assert seen["same"], "what had been saved is not touched"
    assert seen["order"], "nothing is lost once there is room again"
    assert seen["slowest"] < 0.1
    assert seen["leftovers"] == []
    reason = "No space left on device" if kind == "tmpfs" else "File too large"
    assert all(reason in line for line in seen["lines"])
    assert "Free space on that disk" in seen["lines"][0]
    # A second of a full disk is three intervals, and some more on a busy machine.
    assert 1 <= len(seen["lines"]) < 30


def test_complaints(monkeypatch, lines):
    now = [100.0]
    monkeypatch.setattr("vllm_moe_offload.recorder.complaints.time.monotonic", lambda: now[0])
    complaints = Complaints(10.0, lines.append)
    for now[0] in (100.0, 100.0, 105.0, 109.9, 110.0, 115.0):
        complaints.say(f"at {now[0]}")
    assert lines == ["moe-offload: at 100.0.", "moe-offload: at 110.0."]
    complaints.insist("now")
    assert lines[2:] == ["moe-offload: now."]
    for losses in ({"a": 0, "b": 0}, {"a": 1, "b": 0}, {"a": 1, "b": 0}, {"a": 1, "b": 2}):
        complaints.losses(losses)
    assert lines[3:] == [
        "moe-offload: not recorded so far: 1 a.", "moe-offload: not recorded so far: 1 a, 2 b."
    ]  # fmt: skip


def test_directory_is_made(tmp_path):
    prepare_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("where", ["file", "file/below", "nul\0", "/proc/none"])
def test_directory_that_cannot_be(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match=r"trace_path = .*cannot be written to"):
        prepare_directory(tmp_path / where)


def test_directory_that_is_read_only(tmp_path):
    if os.geteuid() == 0:
        where = Path("/proc/self")  # root may write to a directory without permission
    else:
        where = tmp_path / "locked"
        where.mkdir(mode=0o500)
    with pytest.raises(OffloadError, match="leave trace_path out"):
        prepare_directory(where)
