"""A recorder without a server: steps of one sequence, whose ids tell the token's position.

As a script it records in a process of its own, which may be killed or run out of disk.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

import torch

from vllm_moe_offload.recorder import HotSet, Recorder, StepRows, TraceInfo
from vllm_moe_offload.step_log import StepLog
from vllm_moe_offload.trace import load
from vllm_moe_offload.warm_start import ModelIdentity, WarmStartFile

LAYERS, TOP_K, EXPERTS = 2, 2, 1000
IDENTITY = ModelIdentity("m", ("a", "b"), (EXPERTS,) * LAYERS, (TOP_K,) * LAYERS)


class Steps:
    """Feeds a recorder with decode steps of one sequence."""

    def __init__(self, directory, *, interval_s=60.0, file_bytes=1 << 20, warn=print, start=True):
        self.log = StepLog(LAYERS, 8, TOP_K, torch.device("cpu"))
        self.warm_start = WarmStartFile(Path(directory) / "stage0.warm-start", IDENTITY)
        self.recorder = Recorder(
            self.log,
            Path(directory),
            stage=0,
            info=TraceInfo(EXPERTS, "m", "s"),
            warm_start=self.warm_start,
            interval_s=interval_s,
            file_bytes=file_bytes,
            warn=warn,
        )
        self.position = 0
        if start:
            self.recorder.start(HotSet(LAYERS, EXPERTS), {})

    def run(self, count=1):
        """Run steps of one token each."""
        for _ in range(count):
            begun = ((0, 3),) if self.position == 0 else ()
            self.log.ids_LTK[:, :1] = self.position % EXPERTS
            self.recorder.record(StepRows([0], [self.position], [1], None, begun), 1)
            self.position += 1


def recorded(directory):
    """All ids that the files hold, file after file; each token's are the same."""
    found = []
    for path in sorted(Path(directory).glob("*.npz")):
        found += load(path).expert_ids[:, 0, 0].tolist()
    return found


def wait_for(condition, seconds=20.0):
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def run_until_killed(directory):
    """Record without end; each line tells the tokens recorded so far and when that was."""
    steps = Steps(directory, interval_s=0.5, file_bytes=2000, warn=fail)
    while True:
        steps.run(5)
        print(steps.position, time.monotonic(), flush=True)
        time.sleep(0.01)


def run_and_exit(directory):
    """Record a little and leave, without closing."""
    Steps(directory, warn=fail).run(50)


def run_on_a_full_disk(directory, kind):
    """Fill the disk while recording, then make room."""
    lines: list[str] = []
    steps = Steps(directory, interval_s=0.3, warn=lines.append)
    steps.run(300)
    wait_for(lambda: len(recorded(directory)) == 300)
    ballast = fill(directory, kind)
    saved = recorded(directory)
    steps.run(3000)
    wait_for(lambda: lines)
    slowest = 0.0
    for _ in range(200):
        start = time.perf_counter()
        steps.run()
        slowest = max(slowest, time.perf_counter() - start)
        time.sleep(0.005)
    while_full = recorded(directory)
    ballast()
    wait_for(lambda: len(recorded(directory)) == steps.position)
    steps.recorder.close()
    print(json.dumps({
        "lines": lines, "before": len(saved), "slowest": slowest,
        # A save in the middle of the steps may still have fitted.
        "same": saved == while_full[: len(saved)],
        "order": recorded(directory) == [p % EXPERTS for p in range(steps.position)],
        "leftovers": [n for n in os.listdir(directory) if n.endswith(".part")],
    }))  # fmt: skip


def fill(directory, kind):
    """Let files grow no more; returns what undoes it."""
    if kind == "limit":
        size = max(path.stat().st_size for path in Path(directory).iterdir())
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    ballast = Path(directory) / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            pass
    return ballast.unlink


def fail(line):
    """Take no complaint."""
    raise AssertionError(line)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
