"""One system from its start to its end: time, memory and texts."""

import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from machine import without_folder

from peers.agreement import Replies, agreement
from peers.client import PeerError, Prompt, Reply, Round, ask
from peers.memory import PeakMemory, gpu_bytes
from peers.peer import Peer, Setup
from vllm_moe_offload.demo.server import Server

_WARM_UP_TOKENS = 4
_GPU_SLACK = 256 << 20
_RELEASE_S = 30.0
_RETRY_S = 1.0
_ATTEMPTS = 5


@dataclass(frozen=True)
class Questions:
    """The same for all systems.

    Args:
        long: prompts whose first token is timed, one after the other, again and again.
        short: of these, as many as a batch has sequences are sent together.
        warm_up: what is sent before anything is timed.
    """

    long: Sequence[Prompt]
    short: Sequence[Prompt]
    warm_up: Sequence[Prompt]


def measure(
    peer: Peer,
    setup: Setup,
    questions: Questions,
    *,
    rounds: int,
    start_limit_s: float,
    idle_gpu_bytes: int,
) -> tuple[dict[str, Any], Replies]:
    """Measure one system.

    Args:
        peer: which.
        setup: what is the same for all.
        questions: what is asked.
        rounds: how often everything is timed; the median counts.
        start_limit_s: seconds that it may take to be ready.
        idle_gpu_bytes: bytes in use on the GPUs before any system was started.

    Returns:
        Its row, with ``status`` other than ``measured`` if it could not be, and its answers.
    """
    if absent := peer.absent(setup):
        return {"status": absent.status, "remedy": absent.remedy}, {}
    row: dict[str, Any] = {"command": shown(peer.command(setup))}
    log = setup.work / f"{peer.name.replace(' ', '-')}.log"
    replies: dict[int, Sequence[Reply]] = {}
    try:
        peer.prepare(setup)
        server = Server(peer.command(setup), peer.environment(setup), log)
        with server, PeakMemory(server.pid, idle_gpu_bytes) as memory:
            row["ready_s"] = _wait_until_ready(server, peer, questions, start_limit_s)
            replies = _ask_everything(server, peer, setup, questions, memory, row, rounds)
            row |= memory.as_dict()
    # Whatever it is, the other systems are measured all the same.
    except Exception as error:
        return {**row, "status": "failed", "log": f"{error}\n{_tail(log)}"}, {}
    finally:
        _wait_for_release(idle_gpu_bytes)
    return {**row, "status": "measured"}, replies


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
    timed([next(long)], 1)  # finds code that is not compiled yet
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


def _wait_for_release(idle_gpu_bytes: int) -> None:
    """Give the driver time to take back the memory of processes that were killed."""
    stop = time.monotonic() + _RELEASE_S
    while gpu_bytes() > idle_gpu_bytes + _GPU_SLACK and time.monotonic() < stop:
        time.sleep(_RETRY_S)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:] if log.exists() else ""
