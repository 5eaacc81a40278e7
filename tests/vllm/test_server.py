"""``vllm serve`` with the plugin, over HTTP."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cpu_settings import env

from vllm_moe_offload.demo.server import free_port

REQUESTS = 32
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    path, port = checkpoint("olmoe"), free_port()
    log = tmp_path_factory.mktemp("serve") / "log"
    # The plugin's option comes before the model here; the demo has it after.
    command = [str(Path(sys.executable).parent / "vllm"), "serve", "--plugin", "moe-offload",
               str(path), "--moe-offload-cache-fraction", "0.25", "--dtype", "float32",
               "--enforce-eager", "--max-model-len", "256", "--port", str(port),
               "--kv-cache-memory-bytes", str(64 << 20)]  # fmt: skip
    variables = env("olmoe") | {"VLLM_SERVER_DEV_MODE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_health(url, process, log)
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
    assert "MoE layers of 8 experts" in log.read_text()


def wait_for_health(url, process, log):
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(log.read_text()[-4000:])


def body(number, **more):
    prompt = [3 + (number * 17 + i * (number + 3)) % 500 for i in range(1 + 3 * number % 40)]
    return {
        "prompt": prompt,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def complete(url, number):
    answer = httpx.post(f"{url}/v1/completions", json=body(number), timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]["token_ids"]


def cancel_half_way(url, number):
    """Read a few events of a stream and hang up."""
    request = body(number, stream=True, max_tokens=200)
    with httpx.stream("POST", f"{url}/v1/completions", json=request, timeout=120) as stream:
        for events, line in enumerate(stream.iter_lines()):
            if line.startswith("data: {"):
                json.loads(line.removeprefix("data: "))
            if events >= 6:
                return


def test_concurrent_answers_equal_those_of_the_request_alone(server):
    alone = [complete(server, number) for number in range(REQUESTS)]
    with ThreadPoolExecutor(2 * REQUESTS) as pool:
        cancelled = [pool.submit(cancel_half_way, server, n) for n in range(REQUESTS // 4)]
        together = list(pool.map(lambda number: complete(server, number), range(REQUESTS)))
        for future in cancelled:
            future.result()
    assert together == alone
    assert all(len(ids) == MAX_TOKENS for ids in alone)


def test_chat(server):
    message = {"role": "user", "content": "hello"}
    answer = httpx.post(
        f"{server}/v1/chat/completions",
        json={"messages": [message], "max_tokens": 8, "temperature": 0},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


def test_statistics_of_the_running_server(server):
    answer = httpx.post(f"{server}/collective_rpc", json={"method": "moe_offload_stats"})
    assert answer.status_code == 200, answer.text
    text = answer.text
    assert "hits" in text
