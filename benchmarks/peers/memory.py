"""The most memory that a system took, on the GPU and on the host."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import psutil  # vLLM depends on it

from vllm_moe_offload.memory import meminfo

_INTERVAL_S = 0.5
_COST = 20
"""Reading the host's share takes a lock of the process: at most every this many times as long."""

_RELEASE_S = 30.0
_SETTLE_S = 1.0

_SMI = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]


def gpu_bytes() -> int:
    """Bytes in use on the GPUs that this process may use, 0 without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = [*_SMI, f"--id={visible}"] if visible else _SMI
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return 0
    return sum(int(line) << 20 for line in lines.split())


def family(pid: int) -> list[psutil.Process]:
    """A process and its descendants; empty if it is gone."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def proportional_bytes(pid: int) -> int:
    """Host memory of a process and its descendants; shared pages count once among them all."""
    return sum(_proportional(process.pid) for process in family(pid))


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    fields = (line.split() for line in lines if line.startswith("Pss:"))
    return sum(int(kib) * 1024 for _, kib, *_ in fields)


def wait_for_release(processes: Sequence[psutil.Process]) -> None:
    """Wait until processes that were killed are gone and the driver has taken back their memory."""
    stop = time.monotonic() + _RELEASE_S
    while any(map(_is_there, processes)) and time.monotonic() < stop:
        time.sleep(0.1)
    used = gpu_bytes()
    while used and time.monotonic() < stop:
        time.sleep(_SETTLE_S)
        before, used = used, gpu_bytes()
        if used >= before:
            return


def _is_there(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class PeakMemory:
    """Watches a system until it ends, and compares with what is in use without it.

    Two figures for the host, as each misses something: ``host_bytes``, what the processes have
    mapped, files included, misses pages that a driver keeps for itself; ``host_taken_bytes``, by
    how much more of the machine's memory is available once they have ended, misses mapped files,
    and takes what others do meanwhile for the system's. So others may be there, if they stay as
    they are.

    Args:
        pid: its first process.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._look = threading.Lock()
        self._end = threading.Event()
        self._gpu = self._host = 0
        self._available = meminfo()["MemAvailable"]
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()
        self._look_at_gpu()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Leave the processes alone while they are timed, and look right after."""
        with self._look:
            yield
            self._look_at_host()

    def beyond_what_is_left(self) -> dict[str, int]:
        """All figures by name; to be asked for when the system has ended."""
        return {
            "gpu_bytes": max(0, self._gpu - gpu_bytes()),
            "host_bytes": self._host,
            "host_taken_bytes": max(0, meminfo()["MemAvailable"] - self._available),
        }

    def _watch(self) -> None:
        pause = _INTERVAL_S
        while not self._end.wait(pause):
            self._look_at_gpu()
            start = time.monotonic()
            if self._look.acquire(blocking=False):
                try:
                    self._look_at_host()
                finally:
                    self._look.release()
            pause = max(_INTERVAL_S, _COST * (time.monotonic() - start))

    def _look_at_gpu(self) -> None:
        self._gpu = max(self._gpu, gpu_bytes())

    def _look_at_host(self) -> None:
        self._available = min(self._available, meminfo()["MemAvailable"])
        self._host = max(self._host, proportional_bytes(self._pid))
