"""What a server survives, and how it ends: requests of every kind, signals, kills, bad files.

Servers take most of the time here: what can be asked of one that goes on is asked of the same.
"""

import json
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import (
    CLIENT,
    MAX_LENGTH,
    MAX_TOKENS,
    Server,
    body,
    cancel_half_way,
    complete,
    started,
    stream,
)

from vllm_moe_offload.demo.server import free_port
from vllm_moe_offload.lifeline import is_orphaned

REQUESTS = 500
DIFFERENT = 20
CLIENTS = 48
LONG = 200
"""Tokens of a long answer."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Port and folder of temporary files that all servers here use one after the other."""
    return SimpleNamespace(port=free_port(), temporary=tmp_path_factory.mktemp("tmp"))


@pytest.fixture
def start(checkpoint, place, tmp_path):
    """Starts servers that are gone at the end."""
    with ExitStack() as stack:

        def enter(*options: str, port: int = place.port, workers: int = 1) -> Server:
            server = started(
                checkpoint("olmoe"), tmp_path / f"{port}.log", *options,
                port=port, temporary=place.temporary, workers=workers,
            )  # fmt: skip
            return stack.enter_context(server)

        yield enter


# Requests. Each gives the answer to be compared with the one of the request alone, or None.


def plain(url, number):
    return complete(url, number)


def streamed(url, number):
    return [token for event in stream(url, number) for token in event]


def cancelled(url, number):
    cancel_half_way(url, number)


def given_up(url, number):
    """The client hangs up before there is an answer."""
    text = json.dumps(body(number, max_tokens=LONG))
    hang_up(url, f"Content-Length: {len(text)}\r\n\r\n{text}", after=0.01 * number)


def half_sent(url, number):
    """The client hangs up within its own request."""
    text = 'Content-Length: 900\r\n\r\n{"prompt": [1,'
    hang_up(url, text[: len(text) - 6 * (number % 8)])


def hang_up(url, text, after=0.0):
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall((head + text).encode())
        time.sleep(after)


def too_long(url, number):
    prompt = [5] * (MAX_LENGTH + 1 + number)
    refused(url, body(number, prompt=prompt), str(MAX_LENGTH))


MALFORMED = [
    ({"max_tokens": -1}, "max_tokens"),
    ({"prompt": [5, 10**6]}, "vocab"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -3}, "temperature"),
    ({"logprobs": 10**6}, "logprobs"),
    ({"n": 0}, "n"),
]


def malformed(url, number):
    more, named = MALFORMED[number % len(MALFORMED)]
    refused(url, body(number, **more), named)


def no_json(url, number):
    refused(url, b'{"prompt": [1, 2'[: 4 + number % 12], "")


def refused(url, request, named):
    content = {"content": request} if isinstance(request, bytes) else {"json": request}
    headers = {"Content-Type": "application/json"}
    answer = CLIENT.post(f"{url}/v1/completions", headers=headers, **content)
    assert 400 <= answer.status_code < 500, (request, answer.status_code, answer.text)
    assert named in answer.text


KINDS = [plain, streamed, plain, cancelled, streamed, given_up, too_long, half_sent, malformed,
         no_json]  # fmt: skip


def metrics(url, *names):
    text = CLIENT.get(f"{url}/metrics").text
    found = {
        sample.name.removeprefix("vllm:"): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.removeprefix("vllm:") in names
    }
    assert len(found) == len(names), found
    return found


def is_idle(url):
    """Whether nothing is left of any request."""
    gauges = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return not any(metrics(url, *gauges).values())


def statistics(url):
    answer = CLIENT.post(f"{url}/collective_rpc", json={"method": "moe_offload_stats"})
    (stats,) = answer.json()["results"]
    return stats


@pytest.fixture(scope="module")
def server(checkpoint, place, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    with started(checkpoint("olmoe"), log, port=place.port, temporary=place.temporary) as running:
        running.wait_until_healthy()
        yield running


def test_mixed_requests_lose_and_corrupt_nothing(server):
    url = server.url
    alone = [complete(url, number) for number in range(DIFFERENT)]
    assert len({tuple(answer) for answer in alone}) > DIFFERENT // 2

    def send(index):
        # Every kind meets every number.
        number = index // len(KINDS) % DIFFERENT
        return KINDS[index % len(KINDS)](url, number), number

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(send, range(REQUESTS)))
    told = [(answer, number) for answer, number in answers if answer is not None]
    assert len(told) == REQUESTS * 4 // 10
    assert all(answer == alone[number] for answer, number in told)

    # Whoever hung up is forgotten, and has left nothing behind.
    server.wait_until(lambda: is_idle(url), 30)
    assert [complete(url, number) for number in range(DIFFERENT)] == alone
    stats = statistics(url)
    assert stats["active"] == stats["hits"] + stats["misses"] > 0


def test_clients_that_hang_up_are_not_served_on(server):
    url, clients = server.url, 8

    def generated():
        return metrics(url, "generation_tokens_total")["generation_tokens_total"]

    before = generated()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda number: cancel_half_way(url, number), range(clients)))
    server.wait_until(lambda: is_idle(url), 30)
    assert 3 * clients <= generated() - before < LONG * clients / 2


@contextmanager
def load(url) -> Iterator[None]:
    """Clients that stream without end, none of which is left waiting afterwards."""
    stop = Event()
    busy = [Event() for _ in range(8)]

    def client(number):
        while not stop.is_set():
            try:
                for _ in stream(url, number, max_tokens=LONG):
                    busy[number].set()
            except (httpx.TransportError, AssertionError):
                return

    with ThreadPoolExecutor(len(busy)) as pool:
        clients = [pool.submit(client, number) for number in range(len(busy))]
        assert all(event.wait(60) for event in busy)
        try:
            yield
        finally:
            stop.set()
            for future in clients:
                future.result(60)


def shared_memory(server):
    """Files of shared memory that the server's processes have mapped.

    Not the semaphores of Python's multiprocessing, 32 bytes that stay behind when the process that
    made them is killed: they pin nothing.
    """
    found = set()
    for pid in server.processes():
        # A process may end while we look.
        with suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            found |= {line.split(maxsplit=5)[-1] for line in lines if " /dev/shm/" in line}
    found = {name for name in found if "/sem." not in name}
    return {name for name in found if not name.endswith("(deleted)")}


def assert_gone(server, place, seconds=30):
    """Nothing of the server runs, and what it left on disk is nobody's."""
    server.wait_until(lambda: not server.processes(), seconds)
    assert all(is_orphaned(folder / ".claim") for folder in folders(place))


def folders(place):
    """Folders of statistics pages."""
    return list(place.temporary.glob("vllm-moe-offload-*"))


def assert_ends_cleanly(server, place, number):
    with load(server.url):
        memory = shared_memory(server)
        server.process.send_signal(number)
        assert server.process.wait(30) == 0, server.log[-4000:]
    assert_gone(server, place, 5)
    assert not any(Path(name).exists() for name in memory)
    assert not folders(place)
    # vLLM's own processes report the requests that were cut off, none of ours has failed.
    assert "/vllm_moe_offload/" not in server.log, server.log[-6000:]


def test_sigterm_under_load(server, place):
    assert_ends_cleanly(server, place, signal.SIGTERM)


def test_killed_engine_and_killed_worker(start, place):
    """A kill of any process ends all others."""

    def end(server, name):
        server.wait_until_healthy()
        with load(server.url):
            os.kill(pid_of(server, name), signal.SIGKILL)
            server.process.wait(30)

    servers = [start(), start(port=free_port(), workers=2)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(end, servers, ("EngineCore", "Worker_TP1")))
    for server in servers:
        server.wait_until(lambda server=server: not server.processes(), 30)
    assert all(is_orphaned(folder / ".claim") for folder in folders(place))


def test_killed_server(start, place):
    """A start after kills works with the same port."""
    server = start(workers=2)
    server.wait_until_healthy()
    assert len(folders(place)) == 1
    assert len(complete(server.url, 1)) == MAX_TOKENS
    with load(server.url):
        memory = shared_memory(server)
        assert len(server.processes()) >= 4, "API server, engine and two workers"
        os.kill(server.process.pid, signal.SIGKILL)
    assert_gone(server, place)
    # Requests are cut off and the engine ends as for a signal: what is killed leaves its memory.
    assert not any(Path(name).exists() for name in memory)
    assert len(folders(place)) == 1, "there was nobody left to remove it"


def test_sigint_under_load(start, place):
    server = start()
    server.wait_until_healthy()
    assert len(folders(place)) == 1, "what killed servers left is gone"
    assert_ends_cleanly(server, place, signal.SIGINT)


def test_signals_while_loading(start, place):
    def end(server, number):
        server.wait_until(lambda: "Initializing model took" in server.log, 180)
        server.process.send_signal(number)
        return server.process.wait(30)

    numbers = (signal.SIGTERM, signal.SIGINT)
    servers = [start(port=free_port()) for _ in numbers]
    with ThreadPoolExecutor() as pool:
        statuses = list(pool.map(end, servers, numbers))
    assert 0 not in statuses, "they have never served"
    for server in servers:
        assert "Application startup" not in server.log
        assert "/vllm_moe_offload/" not in server.log, server.log[-6000:]
        assert_gone(server, place, 5)
    assert not folders(place)


def test_file_that_is_cut_off(checkpoint, place, tmp_path):
    """The server says which, and ends, before any process of it loads weights."""
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    file = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size // 2)
    with started(folder, tmp_path / "log", temporary=place.temporary) as server:
        assert server.process.wait(60) != 0
        assert f"checkpoint = {file}: " in server.log
        assert "Download the checkpoint again" in server.log
        assert "EngineCore" not in server.log


def pid_of(server, name):
    (pid,) = [pid for pid, command in server.processes().items() if name in command]
    return pid
