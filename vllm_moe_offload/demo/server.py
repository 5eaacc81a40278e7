"""A ``vllm serve`` in processes of its own, which end with the demo."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from vllm_moe_offload.demo.conversation import DemoError, Outcome, Request, ask

CACHE_FRACTION = 0.25

_READY_TIMEOUT_S = 3600.0  # a large checkpoint on a slow disk
_STOP_TIMEOUT_S = 5.0  # a server that is still starting does not react
_TAIL_LINES = 25


def command(model: str, dtype: str, plugin: bool) -> list[str]:
    """Command line of a server, without its port."""
    offload = ["--plugin", "moe-offload", "--moe-offload-cache-fraction", str(CACHE_FRACTION)]
    # Room for the demo's requests and little more: the rest of the memory is for the weights.
    sizes = ["--max-model-len", "1024", "--kv-cache-memory-bytes", "1G"]
    options = [*(offload if plugin else []), "--dtype", dtype, "--enforce-eager", *sizes]
    return [*program(), "serve", model, *options]


def program() -> list[str]:
    """How vLLM's command is called in this environment, whether or not its script was installed."""
    script = Path(sys.executable).with_name("vllm")
    if script.exists():
        return [str(script)]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def environment(model: str, on_cpu: bool, plugin: bool) -> dict[str, str]:
    """Environment of a server, on top of ours."""
    variables = {
        "VLLM_SERVER_DEV_MODE": "1",  # opens /collective_rpc, where the statistics are asked for
        "VLLM_NO_USAGE_STATS": "1",
        # Python would look for packages in the working directory, and in a clone of this
        # repository find a folder `kernels` instead of the package that transformers imports.
        "PYTHONSAFEPATH": "1",
    }
    if not plugin:
        variables["VLLM_PLUGINS"] = ""
    if on_cpu:
        # Even eager mode compiles small functions, which takes longer than all the answers.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    if Path(model).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"
    return variables


def free_port() -> int:
    """Return a TCP port of this host that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A ``vllm serve`` on a free port, ended with its children when the context is left.

    Args:
        command: the command line, to which host and port are added.
        variables: environment variables, on top of ours.
        log: file for what the server prints.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        self._command = [*command, "--host", "127.0.0.1", "--port", str(port := free_port())]
        self._environment = {**os.environ, **variables}
        self._log = log
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        with self._log.open("wb") as log:
            # A session of its own, so that all its processes can be ended together, and Ctrl-C
            # does not reach them before us.
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def pid(self) -> int:
        """Process id of the first process."""
        return self._process.pid

    def wait_until_healthy(self, progress: Callable[[float, str], None]) -> float:
        """Wait for the server to answer and return the seconds it took.

        Args:
            progress: called a few times a second with the seconds and the last message in the log.

        Raises:
            DemoError: the server ended, or takes too long.
        """
        start = time.monotonic()
        with httpx.Client(trust_env=False) as client:
            while not self._is_healthy(client):
                seconds = time.monotonic() - start
                status = self._process.poll()
                if status is not None:
                    raise DemoError(self._complaint(f"ended with status {status}"))
                if seconds > _READY_TIMEOUT_S:
                    raise DemoError(self._complaint(f"was not ready after {seconds:.0f} s"))
                progress(seconds, self._last_message())
                time.sleep(0.2)
        return time.monotonic() - start

    def ask(self, requests: Sequence[Request], with_stats: bool) -> Outcome:
        """Send all requests at once, chats as completions if the model has no chat template.

        Args:
            requests: what to ask.
            with_stats: whether the plugin is there to be asked for its counts.

        Raises:
            DemoError: the server refused a request, or is gone.
        """
        try:
            return asyncio.run(ask(self.url, requests, with_stats))
        except httpx.HTTPStatusError as error:
            raise DemoError(f"{error}\n{error.response.text}") from error
        except httpx.HTTPError as error:
            raise DemoError(self._complaint(f"did not answer: {error!r}")) from error

    def _is_healthy(self, client: httpx.Client) -> bool:
        try:
            return client.get(f"{self.url}/health").is_success
        except httpx.TransportError:
            return False

    def _complaint(self, problem: str) -> str:
        tail = "\n".join(self._tail()[-_TAIL_LINES:])
        return f"The server {problem}. The end of {self._log}:\n\n{tail}"

    def _last_message(self) -> str:
        return next(filter(None, map(_message, reversed(self._tail()))), "starting")

    def _tail(self) -> list[str]:
        with self._log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 16384))
            lines = log.read().decode(errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()]


def _message(log_line: str) -> str | None:
    """What a line of vLLM's logger says, without who said it and when."""
    found = re.search(r"(?:INFO|WARNING|ERROR) .*?\[\w+\.py:\d+\] *(\S.*)", log_line)
    return found and found[1]
