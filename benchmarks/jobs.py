"""Run jobs, each in a process of its own: as many get ready together as fit, one is measured."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shapes import SHAPES
from turn import my_turn

SCRIPT = str(Path(__file__).with_name("timed_server.py"))

LOG_TAIL = 3000
"""Characters of a failed process's log that are kept."""

TIME_LIMIT = 360.0
"""Seconds that a job may take to get ready, and again to be measured."""

GIB = 1 << 30

SERVER_BYTES = 13 * GIB // 2
"""What a server takes of the GPU beside its experts: the other weights, KV cache, activations."""

Job = dict[str, Any]
Result = dict[str, Any]


def run_all(
    jobs: Sequence[Job], memory: "Memory | None" = None, *, time_limit: float = TIME_LIMIT
) -> Iterator[Result]:
    """Measure jobs, each alone on the GPU, in rounds of what fits into the memory together.

    Starting a server takes a minute or two of one core, so all of a round start at once, and
    while one is measured the others wait.

    Yields:
        For each job its ``rows``, every row with the job's name, server, share and shape;
        ``copy_gb_s``; ``seconds``; and for one that failed its ``exit`` status and ``log``.
    """
    planned = rounds(jobs, memory or Memory(device=0, host=0))
    processes = [_Process(job) for job in planned[0]] if planned else []
    following: list[_Process] = []
    try:
        for number in range(len(planned)):
            for process in processes:
                process.start()
            # These import vLLM while the others get ready, and wait then.
            following = [_Process(job) for together in planned[number + 1 : number + 2]
                         for job in together]  # fmt: skip
            for process in processes:
                process.get_ready(time_limit)
            for process in processes:
                with my_turn():
                    result = process.result(time_limit)
                process.close()
                yield result
            processes, following = following, []
    finally:
        for process in [*processes, *following]:
            process.close()


class Memory:
    """Bytes of each GPU and of the host that the servers of a round may take together.

    ``servers`` is how many they may be; pinned memory of many takes some of the bus from each.
    """

    def __init__(self, device: int, host: int, servers: int = 99) -> None:
        self.device, self.host, self.servers = device, host, servers

    @classmethod
    def of_this_machine(cls, servers: int = 99) -> "Memory":
        """What is free now, less a margin; nothing without a GPU, where jobs run one by one."""
        import torch

        from vllm_moe_offload.memory import available_host_memory

        if not torch.cuda.is_available():
            return cls(0, 0)
        free = torch.cuda.mem_get_info()[0]
        return cls(int(free * 0.96), int(available_host_memory().available * 0.85), servers)


def rounds(jobs: Sequence[Job], memory: Memory) -> list[list[Job]]:
    """Put every job into the first round that has room for it; one that is too large runs alone."""
    found: list[list[Job]] = []
    left: list[dict[Any, int]] = []
    for job in jobs:
        device, host = needs(job)
        gpu = job.get("gpu", 0)
        fits = (
            n for n, room in enumerate(left)
            if device <= room.get(gpu, memory.device) and host <= room["host"]
            and len(found[n]) < memory.servers
        )  # fmt: skip
        number = next(fits, len(found))
        if number == len(found):
            found.append([])
            left.append({"host": memory.host})
        found[number].append(job)
        room = left[number]
        room[gpu] = room.get(gpu, memory.device) - device
        room["host"] -= host
    return found


def needs(job: Job) -> tuple[int, int]:
    """Bytes of the GPU and of the host that a job takes, roughly, or as it says itself."""
    if "needs" in job:
        return tuple(job["needs"])
    experts = SHAPES[job["shape"]].pool_bytes
    if job["kind"] == "resolve":
        return experts // SHAPES[job["shape"]].moe_layers + GIB, GIB
    host = {"resident": 0.0, "cpu-offload": 1.0 - job["share"], "plugin": 1.0}[job["server"]]
    return int(job["share"] * experts) + SERVER_BYTES, int(host * experts) + 4 * GIB


def _seeing(gpu: int | None) -> dict[str, str] | None:
    """The environment in which there is one GPU, None for the one of this process."""
    if gpu is None:
        return None
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = names.split(",")[gpu] if names else str(gpu)
    return {**os.environ, "CUDA_VISIBLE_DEVICES": name}


class _Process:
    """One process and its job: imports vLLM, is told to get ready, and then to measure."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._folder = tempfile.TemporaryDirectory()
        self._out = Path(self._folder.name, "rows.json")
        self._ready = Path(self._folder.name, "ready")
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, SCRIPT, "--out", str(self._out), "--ready", str(self._ready)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True,
                env=_seeing(job.get("gpu")),
            )  # fmt: skip

    def start(self) -> None:
        self._say(json.dumps(self._job))

    def get_ready(self, time_limit: float) -> None:
        stop = time.monotonic() + time_limit
        while self._process.poll() is None and not self._ready.exists():
            if time.monotonic() > stop:
                self._stop()
                return
            time.sleep(0.05)

    def result(self, time_limit: float) -> Result:
        start = time.monotonic()
        self._say("measure")
        try:
            code: int | str = self._process.wait(time_limit)
        except subprocess.TimeoutExpired:
            self._stop()
            code = f"stopped after {time_limit:.0f} s"
        job = self._job
        found = json.loads(self._out.read_text()) if self._out.exists() else {"rows": []}
        about = {"configuration": job["name"]} | {k: job[k] for k in ("server", "share", "shape")}
        result = {
            "configuration": job["name"],
            "exit": code,
            "seconds": round(time.monotonic() - start, 1),
            "copy_gb_s": found.get("copy_gb_s"),
            "rows": [{**about, **row} for row in found["rows"]],
        }
        return result if code == 0 else {**result, "log": self._tail()}

    def close(self) -> None:
        self._stop()
        self._folder.cleanup()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died, which its exit status will tell

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_TAIL:]
