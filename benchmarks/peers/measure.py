"""Systems from their start to their end: time, memory and texts."""

import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from types import TracebackType
from typing import Any, Self

from machine import without_folder
from turn import my_turn

from peers.agreement import Replies, agreement
from peers.client import PeerError, Prompt, Reply, Round, ask
from peers.memory import PeakMemory, family, wait_for_release
from peers.peer import Peer, Setup
from vllm_moe_offload.demo.server import Server

_WARM_UP_TOKENS = 4
_RETRY_S = 1.0
_ATTEMPTS = 5


@dataclass(frozen=True)
class Questions:
    """The same for all systems.

    Args:
        long: prompts whose first token is timed, one after the other, again and again.
        short: of these, as many as a batch has sequences are sent together.
        warm_up: what is sent before anything is timed.
        long_warm_up: one as long as those of ``long``, and none of them: kernels for so many
            tokens are compiled when it comes.
    """

    long: Sequence[Prompt]
    short: Sequence[Prompt]
    warm_up: Sequence[Prompt]
    long_warm_up: Prompt


def measure(
    peers: Sequence[Peer],
    setup: Setup,
    questions: Questions,
    *,
    rounds: int,
    start_limit_s: float,
) -> Iterator[tuple[dict[str, Any], Replies]]:
    """Start systems at once, and measure one after the other while the rest is asked nothing.

    Memory of one that is alone counts from its start, of several from when all are ready.

    Args:
        peers: which.
        setup: what is the same for all.
        questions: what is asked.
        rounds: how often everything is timed; the median counts.
        start_limit_s: seconds that they may take to be ready.

    Yields:
        For each its row, with ``status`` other than ``measured`` if it could not be, and its
        answers. It has ended by then.
    """
    # Servers end before the threads that wait for them are waited for.
    with ThreadPoolExecutor() as pool, ExitStack() as servers:
        systems = [servers.enter_context(_System(peer, setup)) for peer in peers]
        if len(systems) == 1:
            systems[0].watch_memory()
        list(pool.map(lambda system: system.get_ready(questions, start_limit_s), systems))
        for system in systems:
            with my_turn():
                system.answer(questions, rounds)
            system.end()
            yield system.row, system.replies


class _System:
    """One system. What goes wrong with it is kept in its row, and nothing more happens to it."""

    def __init__(self, peer: Peer, setup: Setup) -> None:
        self._peer = peer
        self._setup = setup
        self._log = setup.work / f"{peer.name.replace(' ', '-')}.log"
        self._running = ExitStack()
        self._server: Server | None = None
        self._memory: PeakMemory | None = None
        self.row: dict[str, Any] = {}
        self.replies: dict[int, Sequence[Reply]] = {}

    def __enter__(self) -> Self:
        if absent := self._peer.absent(self._setup):
            self.row |= {"status": absent.status, "remedy": absent.remedy}
            return self
        with self._failures_kept():
            command = self._peer.command(self._setup)
            self.row["command"] = shown(command)
            self._peer.prepare(self._setup)
            server = Server(command, self._peer.environment(self._setup), self._log)
            self._server = self._running.enter_context(server)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._running.close()

    def watch_memory(self) -> None:
        """Count its memory from now on."""
        if self._server and not self._memory:
            self._memory = self._running.enter_context(PeakMemory(self._server.pid))

    def get_ready(self, questions: Questions, limit_s: float) -> None:
        """Wait until it answers."""
        with self._failures_kept():
            if self._server:
                self.row["ready_s"] = _wait_until_ready(
                    self._server, self._peer, questions, limit_s
                )

    def answer(self, questions: Questions, rounds: int) -> None:
        """Ask and time it."""
        if "status" in self.row:
            return
        with self._failures_kept():
            self.watch_memory()
            assert self._server
            assert self._memory
            self.replies = _ask_everything(
                self._server, self._peer, self._setup, questions, self._memory, self.row, rounds
            )
            self.row["status"] = "measured"

    def end(self) -> None:
        """End its processes and see what they leave free."""
        processes = family(self._server.pid) if self._server else []
        self._running.close()
        wait_for_release(processes)
        if self._memory and self.row["status"] == "measured":
            self.row |= self._memory.beyond_what_is_left()

    @contextmanager
    def _failures_kept(self) -> Iterator[None]:
        try:
            yield
        # Whatever it is, the other systems are measured all the same.
        except Exception as error:
            self.row |= {"status": "failed", "log": f"{error}\n{self._tail()}"}

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""


def shown(command: Sequence[str]) -> str:
    """A command line without where things lie on this machine."""
    return shlex.join(map(without_folder, command))


def compare(row: dict[str, Any], reference: Replies, replies: Replies) -> None:
    """Add to a row how its texts agree with those of the reference."""
    if reference and replies:
        row["agreement"] = agreement(reference, replies)


def _wait_until_ready(server: Server, peer: Peer, questions: Questions, limit_s: float) -> float:
    """Wait for health and a first answer: some servers are healthy while they load."""

    def check(seconds: float, message: str) -> None:
        if seconds > limit_s:
            raise PeerError(f"was not ready after {seconds:.0f} s: {message}")

    start = time.monotonic()
    server.wait_until_healthy(check)
    while True:
        try:
            ask(server.url, peer.dialect, questions.warm_up[:1], _WARM_UP_TOKENS)
            return round(time.monotonic() - start, 1)
        except PeerError as error:
            if "answered 503" not in str(error) or time.monotonic() - start > limit_s:
                raise
            time.sleep(_RETRY_S)


def _ask_everything(
    server: Server, peer: Peer, setup: Setup, questions: Questions, memory: PeakMemory,
    row: dict[str, Any], rounds: int,
) -> dict[int, Sequence[Reply]]:  # fmt: skip
    for batch in setup.batches:  # whatever is set up late, for each size
        ask(server.url, peer.dialect, questions.warm_up[:batch], _WARM_UP_TOKENS)

    def timed(prompts: Sequence[Prompt], tokens: int) -> Round:
        with memory.quiet():
            return ask(server.url, peer.dialect, prompts, tokens)

    long = cycle(questions.long)
    ask(server.url, peer.dialect, [questions.long_warm_up], 1)
    waits = punctual(lambda: timed([next(long)], 1), rounds)
    row["first_token_s"] = _median(r.first_token_s for r in waits)
    row["decode_tokens_per_s"] = {}
    replies: dict[int, Sequence[Reply]] = {}
    for batch in setup.batches:
        prompts = questions.short[:batch]
        replies[batch] = timed(prompts, setup.new_tokens).replies
        found = punctual(lambda p=prompts: timed(p, setup.new_tokens), rounds)
        row["decode_tokens_per_s"][str(batch)] = _median(r.decode_tokens_per_s for r in found)
    return replies


def punctual(ask_once: Callable[[], Round], wanted: int) -> list[Round]:
    """Ask until enough rounds are not spoilt by a client that did not get to run in time.

    Returns:
        So many rounds, or fewer on a machine too busy to measure on.
    """
    found: list[Round] = []
    for _ in range(_ATTEMPTS * wanted):
        if len(found) == wanted:
            break
        if (one := ask_once()).is_punctual:
            found.append(one)
    return found


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
