"""``vllm serve`` with the plugin in processes of its own, and requests to it."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from cpu_settings import env

from vllm_moe_offload.demo.server import free_port

MAX_TOKENS = 24
MAX_LENGTH = 256

CLIENT = httpx.Client(
    timeout=120,
    # Every request has a connection of its own, which ends with it.
    limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    trust_env=False,
)
"""One for all threads: making one takes longer than many a request."""


class Server:
    """A server of its own session, whose processes and files can be told from others'.

    Args:
        path: the checkpoint.
        log: file for what it prints.
        options: added to the command line.
        port: where it listens, a free one by default.
        temporary: where its processes put temporary files.
        workers: tensor parallel size.
        offload: what says how much memory slots get.
        kv_bytes: of the KV cache.
    """

    def __init__(
        self,
        path: Path,
        log: Path,
        *options: str,
        port: int | None = None,
        temporary: Path | None = None,
        workers: int = 1,
        offload: Sequence[str] = ("--moe-offload-cache-fraction", "0.25"),
        kv_bytes: int = 64 << 20,
    ) -> None:
        port = port or free_port()
        # The plugin's option comes before the model here; the demo has it after.
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve",
                   "--plugin", "moe-offload", str(path), *offload, "--dtype", "float32",
                   "--enforce-eager", "--max-model-len", str(MAX_LENGTH), "--port", str(port),
                   "--kv-cache-memory-bytes", str(kv_bytes),
                   "--tensor-parallel-size", str(workers), *options]  # fmt: skip
        variables = env("olmoe", workers) | {"VLLM_SERVER_DEV_MODE": "1"}
        if temporary is not None:
            variables["TMPDIR"] = str(temporary)
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    def wait_until_healthy(self) -> None:
        """Wait until it answers."""

        def is_healthy() -> bool:
            assert self.process.poll() is None, self.log[-4000:]
            with suppress(httpx.TransportError):
                return CLIENT.get(f"{self.url}/health").status_code == 200
            return False

        self.wait_until(is_healthy, 180)

    def wait_until(self, condition: Any, seconds: float) -> None:
        """Wait for a condition, and fail with the end of the log if it does not come true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(self.log[-4000:])
            time.sleep(0.1)

    def processes(self) -> dict[int, str]:
        """Command line of every process of the server that runs, by its id."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            # A process may end while we look.
            with suppress(FileNotFoundError, ProcessLookupError):
                fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
                if fields[0] not in "ZX" and int(fields[3]) == self.process.pid:
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode()
        return found

    def kill(self) -> None:
        """Leave nothing running, whatever happened."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def started(*args: Any, **kwargs: Any) -> Iterator[Server]:
    """A server that is starting, and none afterwards; for the arguments see ``Server``."""
    server = Server(*args, **kwargs)
    try:
        yield server
    finally:
        server.kill()


def body(number: int, **more: Any) -> dict[str, Any]:
    """A request that differs from those of other numbers."""
    prompt = [3 + (number * 17 + i * (number + 3)) % 500 for i in range(1 + 3 * number % 40)]
    return {
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def complete(url: str, number: int) -> list[int]:
    """Answer of a request as token ids."""
    answer = CLIENT.post(f"{url}/v1/completions", json=body(number))
    answer.raise_for_status()
    return answer.json()["choices"][0]["token_ids"]


def stream(url: str, number: int, **more: Any) -> Iterator[list[int]]:
    """Answer of a request event by event; hangs up if it is not read to the end."""
    request = body(number, stream=True, **more)
    with CLIENT.stream("POST", f"{url}/v1/completions", json=request) as events:
        assert events.status_code == 200
        for line in events.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "choices" in event, event
                yield event["choices"][0]["token_ids"]


def cancel_half_way(url: str, number: int) -> None:
    """Read a few events of a stream and hang up."""
    events = stream(url, number, max_tokens=200)
    for _ in range(3):
        next(events)
    events.close()
