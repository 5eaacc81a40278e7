"""The most memory that a system took, on the GPU and on the host."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import psutil  # vLLM depends on it

from vllm_moe_offload.memory import meminfo

_INTERVAL_S = 0.5
_COST = 20
"""Reading the host's share takes a lock of the process: at most every this many times as long."""

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


def proportional_bytes(pid: int) -> int:
    """Host memory of a process and its descendants; shared pages count once among them all."""
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_proportional(process.pid) for process in processes)


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    fields = (line.split() for line in lines if line.startswith("Pss:"))
    return sum(int(kib) * 1024 for _, kib, *_ in fields)


class PeakMemory:
    """Watches a system from its start to its end.

    Two figures for the host, as each misses something: ``host_bytes``, what the processes have
    mapped, files included, misses pages that a driver keeps for itself; ``host_taken_bytes``, by
    how much the machine's available memory fell, misses mapped files, and takes what others do
    meanwhile for the system's.

    Args:
        pid: its first process.
        idle_gpu_bytes: bytes in use on the GPUs before any system was started.
    """

    def __init__(self, pid: int, idle_gpu_bytes: int) -> None:
        self._pid = pid
        self._idle_gpu = idle_gpu_bytes
        self._available = meminfo()["MemAvailable"]
        self._look = threading.Lock()
        self._end = threading.Event()
        self.gpu_bytes = self.host_bytes = self.host_taken_bytes = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Leave the processes alone while they are timed, and look right after."""
        with self._look:
            yield
            self._look_at_host()

    def as_dict(self) -> dict[str, int]:
        """All figures by name."""
        names = ("gpu_bytes", "host_bytes", "host_taken_bytes")
        return {name: getattr(self, name) for name in names}

    def _watch(self) -> None:
        pause = _INTERVAL_S
        while not self._end.wait(pause):
            self.gpu_bytes = max(self.gpu_bytes, gpu_bytes() - self._idle_gpu)
            start = time.monotonic()
            if self._look.acquire(blocking=False):
                try:
                    self._look_at_host()
                finally:
                    self._look.release()
            pause = max(_INTERVAL_S, _COST * (time.monotonic() - start))

    def _look_at_host(self) -> None:
        taken = self._available - meminfo()["MemAvailable"]
        self.host_taken_bytes = max(self.host_taken_bytes, taken)
        self.host_bytes = max(self.host_bytes, proportional_bytes(self._pid))
