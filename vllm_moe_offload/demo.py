"""Serve a model with and without offloading and compare the answers: ``vllm-moe-offload demo``.

Two servers run one after the other, each in processes of its own, since a process has either the
plugin's hooks or stock vLLM; one at a time, because two share the machine's cores and memory
and together start no sooner. vLLM is not imported here.
"""

import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import httpx  # vLLM's server depends on it
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_moe_offload.checkpoints import make_checkpoint

FOLDER = Path(".demo")
CACHE_FRACTION = 0.25
TOKENS_PER_ANSWER = 32

_READY_TIMEOUT_S = 3600.0  # a large checkpoint on a slow disk
_ANSWER_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 5.0  # a server that is still starting does not react
_TAIL_LINES = 25


class DemoError(RuntimeError):
    """The demo cannot go on; the text is for the user."""


@dataclass(frozen=True)
class Request:
    """One request to the OpenAI API: greedy, of fixed length, answered with its token ids."""

    text: str
    is_chat: bool

    @property
    def path(self) -> str:
        """Where it is sent."""
        return "/v1/chat/completions" if self.is_chat else "/v1/completions"

    def body(self, max_tokens: int) -> dict[str, Any]:
        """What is sent."""
        message = {"messages": [{"role": "user", "content": self.text}]}
        return {
            **(message if self.is_chat else {"prompt": self.text}),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }


_PROMPTS = (
    "A mixture of experts replaces",
    "The router scores the experts and",
    "Copies are slow, therefore",
    "def add(a, b):\n    return",
)
_QUESTIONS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Why do most experts not fit into one accelerator?",
    "Count from 1 to 9.",
)
REQUESTS = (
    *(Request(text, is_chat=False) for text in _PROMPTS),
    *(Request(text, is_chat=True) for text in _QUESTIONS),
)


@dataclass(frozen=True)
class Answer:
    """What a server generated for a request."""

    request: Request
    text: str
    token_ids: list[int]

    @classmethod
    def parse(cls, request: Request, reply: Mapping[str, Any]) -> Self:
        """Read a reply of either kind.

        Raises:
            DemoError: the reply has no token ids, so there is nothing to compare.
        """
        choice = reply["choices"][0]
        if not choice.get("token_ids"):
            raise DemoError(f"The server returned no token ids for {request.text!r}.")
        text = choice["message"].get("content") if request.is_chat else choice["text"]
        return cls(request, text or "", choice["token_ids"])


@dataclass(frozen=True)
class Outcome:
    """One server's answers to all requests at once, the time, and what the plugin counted."""

    answers: list[Answer]
    seconds: float
    stats: dict[str, int]

    @property
    def ms_per_token(self) -> float:
        """Wall time over the tokens of all answers."""
        return 1e3 * self.seconds / sum(len(a.token_ids) for a in self.answers)


def run(model: str | None, dtype: str | None = None) -> int:
    """Run the demo and return its exit status: 0 if all token ids are identical.

    Args:
        model: a checkpoint's folder or name on the hub; None makes a small random one.
        dtype: vLLM's option; None takes the checkpoint's on a GPU, and otherwise float32, in
            which two implementations of one model do not differ in their greedy choice.
    """
    console = Console(highlight=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)  # the servers end with us
    try:
        return _compare(console, model, dtype)
    except (DemoError, PackageNotFoundError, OSError) as error:
        console.print(Text(str(error), style="red"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; no server is left running.")
        return 130


def _compare(console: Console, model: str | None, dtype: str | None) -> int:
    on_cpu = "cpu" in version("vllm")
    dtype = dtype or ("float32" if on_cpu or model is None else "auto")
    FOLDER.mkdir(exist_ok=True)
    model = model or str(_small_checkpoint(console))
    offloaded = _serve(console, model, dtype, on_cpu, plugin=True)
    stock = _serve(console, model, dtype, on_cpu, plugin=False)
    identical = [a.token_ids for a in offloaded.answers] == [a.token_ids for a in stock.answers]
    console.print(texts_table(offloaded, stock), figures_table(offloaded, stock), sep="\n")
    if not identical and dtype != "float32":
        console.print(
            "In 16 bit, two correct implementations may choose differently where two tokens are "
            "nearly equal; --dtype float32 compares without that."
        )
    console.print(f"identical: {'yes' if identical else 'no'}")
    return 0 if identical else 1


def _serve(console: Console, model: str, dtype: str, on_cpu: bool, plugin: bool) -> Outcome:
    line = command(model, dtype, plugin)
    log = FOLDER / ("moe-offload.log" if plugin else "stock.log")
    console.print(Text(f"$ vllm {shlex.join(line[1:])}"), soft_wrap=True)
    with Server(line, environment(model, on_cpu, plugin), log) as server:
        with _Progress(console) as progress:
            seconds = server.wait_until_healthy(progress)
        console.print(f"  ready after {seconds:.0f} s, log in {log}")
        console.print(f"  sending {len(REQUESTS)} requests at once")
        outcome = server.ask(REQUESTS, with_stats=plugin)
    tokens = sum(len(a.token_ids) for a in outcome.answers)
    console.print(f"  {tokens} tokens in {outcome.seconds:.1f} s")
    return outcome


class _Progress:
    """Shows seconds and what the server does, in place or, if not on a terminal, now and then.

    Args:
        console: where to.
    """

    _INTERVAL_S = 5.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("  starting")
        self._next_s = self._INTERVAL_S

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._status.stop()

    def __call__(self, seconds: float, message: str) -> None:
        text = Text(f"  {seconds:3.0f} s  {message}")
        text.truncate(self._console.width - 4, overflow="ellipsis")
        if self._console.is_terminal:
            self._status.update(text)
        elif seconds >= self._next_s:
            self._next_s += self._INTERVAL_S
            self._console.print(text)


def command(model: str, dtype: str, plugin: bool) -> list[str]:
    """Command line of a server, without its port."""
    offload = ["--plugin", "moe-offload", "--moe-offload-cache-fraction", str(CACHE_FRACTION)]
    # Room for the demo's requests and little more: the rest of the memory is for the weights.
    sizes = ["--max-model-len", "1024", "--kv-cache-memory-bytes", "1G"]
    options = [*(offload if plugin else []), "--dtype", dtype, "--enforce-eager", *sizes]
    return [str(Path(sys.executable).with_name("vllm")), "serve", model, *options]


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


def _small_checkpoint(console: Console) -> Path:
    path = FOLDER / "qwen3-moe"
    if path.exists():
        return path
    console.print(f"Making a small random Qwen3-MoE checkpoint: {path}")
    with TemporaryDirectory(dir=FOLDER) as scratch:
        made = make_checkpoint(
            Path(scratch) / path.name,
            "qwen3_moe",
            num_layers=6,
            num_experts=32,
            top_k=4,
            hidden_size=256,
            intermediate_size=128,
        )
        made.rename(path)  # only a complete one gets the name
    return path


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
            return asyncio.run(_ask(self.url, requests, with_stats))
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


async def _ask(url: str, requests: Sequence[Request], with_stats: bool) -> Outcome:
    async with httpx.AsyncClient(
        base_url=url, timeout=_ANSWER_TIMEOUT_S, trust_env=False
    ) as client:
        # The first requests pay for what is set up late; they are not part of the figures.
        await _answer(client, Request("Hello", is_chat=False), max_tokens=4)
        if not await _can_chat(client):
            requests = [replace(request, is_chat=False) for request in requests]
        before = await _stats(client) if with_stats else {}
        start = time.monotonic()
        answers = await asyncio.gather(*(_answer(client, r, TOKENS_PER_ANSWER) for r in requests))
        seconds = time.monotonic() - start
        after = await _stats(client) if with_stats else {}
    return Outcome(answers, seconds, _since(before, after))


async def _answer(client: httpx.AsyncClient, request: Request, max_tokens: int) -> Answer:
    response = await client.post(request.path, json=request.body(max_tokens))
    response.raise_for_status()
    return Answer.parse(request, response.json())


async def _can_chat(client: httpx.AsyncClient) -> bool:
    try:
        await _answer(client, Request("Hello", is_chat=True), max_tokens=4)
    except httpx.HTTPStatusError as error:
        if "chat template" in error.response.text:
            return False
        raise
    return True


async def _stats(client: httpx.AsyncClient) -> dict[str, int]:
    response = await client.post("/collective_rpc", json={"method": "moe_offload_stats"})
    response.raise_for_status()
    (of_worker,) = response.json()["results"]
    if of_worker is None:
        raise DemoError("The server offloaded nothing.")
    return of_worker


def _since(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    counts = ("active", "hits", "misses", "streamed", "bytes_moved")
    return {n: value - before[n] if n in counts else value for n, value in after.items()}


def texts_table(offloaded: Outcome, stock: Outcome) -> Table:
    """Every answer once; both texts where the servers differ."""
    table = Table("request", "prompt", "text", box=box.SIMPLE)
    for ours, theirs in zip(offloaded.answers, stock.answers, strict=True):
        same = ours.token_ids == theirs.token_ids
        text = _one_line(ours.text) if same else _difference(ours, theirs)
        kind = "chat" if ours.request.is_chat else "completion"
        table.add_row(kind, Text(_one_line(ours.request.text)), Text(text))
    return table


def _difference(ours: Answer, theirs: Answer) -> str:
    pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), "the end")
    return (
        f"token ids differ from position {first} on\n"
        f"moe-offload: {_one_line(ours.text)}\nstock: {_one_line(theirs.text)}"
    )


def _one_line(text: str) -> str:
    # A random model generates control characters and broken UTF-8 too.
    printable = (c if c.isprintable() and c != "\ufffd" else " " for c in text)
    return " ".join("".join(printable).split())


def figures_table(offloaded: Outcome, stock: Outcome) -> Table:
    """What the plugin counted, and the time of both servers."""
    table = Table("", "moe-offload", "stock vLLM", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    stats = offloaded.stats
    for title, value in (
        ("experts in pool", f"{stats['experts_in_pool']}"),
        ("experts in slots", f"{stats['resident']} of {stats['slots']}"),
        ("hits", f"{stats['hits']}"),
        ("misses", f"{stats['misses']}"),
        ("bytes moved", f"{stats['bytes_moved'] / 2**20:.1f} MiB"),
    ):
        table.add_row(title, value, "-")
    times = (f"{outcome.ms_per_token:.2f} ms" for outcome in (offloaded, stock))
    table.add_row(f"time a token, {len(stock.answers)} requests at once", *times)
    return table
