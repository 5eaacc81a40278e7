"""Run jobs one after the other, each in a process of its own that is ready when its turn comes."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPT = str(Path(__file__).with_name("timed_server.py"))

LOG_TAIL = 3000
"""Characters of a failed process's log that are kept."""

TIME_LIMIT = 240.0
"""Seconds that a job may take."""

Result = dict[str, Any]


def run_all(jobs: list[dict[str, Any]], *, time_limit: float = TIME_LIMIT) -> Iterator[Result]:
    """Measure jobs in order.

    While one runs, the process of the next imports vLLM and waits: that takes seconds of one core
    and nothing of the GPU.

    Yields:
        For each job its ``rows``, every row with the job's name, server, share and shape;
        ``copy_gb_s``; ``seconds``; and for one that failed its ``exit`` status and ``log``.
    """
    waiting = _Process() if jobs else None
    for number, job in enumerate(jobs):
        assert waiting is not None
        running, waiting = waiting, None
        try:
            running.start(job)
            waiting = _Process() if number + 1 < len(jobs) else None
            yield running.result(time_limit)
        except BaseException:
            if waiting is not None:
                waiting.close()
            raise
        finally:
            running.close()


class _Process:
    """One process that has been started and may have got its job."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out = Path(self._folder.name, "rows.json")
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, SCRIPT, "--out", str(self._out)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    def start(self, job: dict[str, Any]) -> None:
        self._job, self._start = job, time.monotonic()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died while it waited, which its exit status will tell

    def result(self, time_limit: float) -> Result:
        try:
            code: int | str = self._process.wait(time_limit)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            code = f"stopped after {time_limit:.0f} s"
        job = self._job
        found = json.loads(self._out.read_text()) if self._out.exists() else {"rows": []}
        about = {"configuration": job["name"]} | {k: job[k] for k in ("server", "share", "shape")}
        result = {
            "configuration": job["name"],
            "exit": code,
            "seconds": round(time.monotonic() - self._start, 1),
            "copy_gb_s": found.get("copy_gb_s"),
            "rows": [{**about, **row} for row in found["rows"]],
        }
        return result if code == 0 else {**result, "log": self._tail()}

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_TAIL:]
