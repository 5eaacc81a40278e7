"""``vllm serve`` with the plugin, over HTTP."""

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import CLIENT, MAX_TOKENS, cancel_half_way, complete, started

from vllm_moe_offload import cli
from vllm_moe_offload.lifeline import is_orphaned
from vllm_moe_offload.metrics.families import PREFIX

REQUESTS = 32


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """URL of a server with two API servers, of which one is killed in the end."""
    folder = tmp_path_factory.mktemp("serve")
    options = ("--moe-offload-stats-interval-s", "2", "--api-server-count", "2")
    with started(checkpoint("olmoe"), folder / "log", *options, temporary=folder) as running:
        running.wait_until_healthy()
        yield running.url
        end_by_a_kill(running, "APIServer_1", folder)
        assert "MoE layers of 8 experts" in running.log
        assert "active experts were in slots" in running.log


def end_by_a_kill(running, name, folder):
    """Kill one process; all others have to end, and what they left is nobody's."""
    (pid,) = [pid for pid, command in running.processes().items() if name in command]
    os.kill(pid, signal.SIGKILL)
    running.wait_until(lambda: not running.processes(), 30)
    assert all(is_orphaned(pages / ".claim") for pages in folder.glob("vllm-moe-offload-*"))


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
    answer = CLIENT.post(
        f"{server}/v1/chat/completions",
        json={"messages": [message], "max_tokens": 8, "temperature": 0},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]


def statistics(url):
    """What the one worker counts, exactly."""
    answer = CLIENT.post(f"{url}/collective_rpc", json={"method": "moe_offload_stats"})
    assert answer.status_code == 200, answer.text
    (stats,) = answer.json()["results"]
    return stats


def metrics(url):
    """The plugin's samples by name without the prefix, layer and cause."""
    answer = CLIENT.get(f"{url}/metrics")
    assert answer.status_code == 200, answer.text
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX):
                labels = sample.labels
                key = (sample.name.removeprefix(PREFIX), labels.get("layer"), labels.get("cause"))
                assert key not in found, "one worker has every sample once"
                found[key] = sample.value
    return found


def settled_metrics(url):
    """The samples once they have caught up with a server that has nothing to do."""
    active = statistics(url)["active"]
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = metrics(url)
        if total(found, "hits_total") + total(found, "misses_total") == active:
            return found
        time.sleep(0.1)
    return pytest.fail(f"/metrics shows {found}, but {active} experts were active")


def total(found, name, cause=None):
    return sum(value for key, value in found.items() if (key[0], key[2]) == (name, cause))


def assert_equal(found, stats):
    """Assert that ``/metrics`` says layer for layer what the worker says."""
    for layer in stats["by_layer"]:
        number = layer["layer"]
        misses = layer["loads"] + layer["streams"]
        assert found["hits_total", number, None] == layer["hits"]
        assert found["misses_total", number, None] == misses
        assert found["resident_experts", number, None] == layer["resident"]
        assert found["slots", number, None] == layer["slots"] == 2
        assert found["experts", number, None] == 8
        moved = sum(found["bytes_total", number, cause] for cause in ("demand", "wave"))
        assert moved == (misses + layer["surplus"]) * layer["row_bytes"]
    assert total(found, "bytes_total", "demand") == stats["demand_bytes"]
    assert total(found, "bytes_total", "wave") == stats["wave_bytes"]
    assert found["policy_info", None, None] == 1


def test_metrics_of_the_running_server(server):
    complete(server, 1)
    before = settled_metrics(server)
    stats = statistics(server)
    assert len(stats["by_layer"]) == stats["layers"] == 4
    assert_equal(before, stats)
    complete(server, 2)
    after = settled_metrics(server)
    assert_equal(after, statistics(server))
    for (name, layer, _), value in before.items():
        if name == "misses_total":
            assert after[name, layer, None] > value, f"layer {layer} has not moved on"


def test_dashboard_finds_its_metrics(server):
    dashboard = (files("vllm_moe_offload.metrics") / "grafana.json").read_text()
    asked = set(re.findall(r"(?:vllm:|vllm_moe_offload_)\w+", dashboard))
    types = set(re.findall(r"^# TYPE (\S+)", CLIENT.get(f"{server}/metrics").text, re.MULTILINE))
    assert len(asked) > 10
    assert asked <= types


def test_watch(server, capsys):
    complete(server, 3)
    settled_metrics(server)
    assert cli.main(["watch", server, "--once", "--interval-s", "0.5"]) == 0
    shown = capsys.readouterr().out
    stats = statistics(server)
    assert f"{stats['hits'] / stats['active']:.0%} since the start" in shown
    assert [f"layer {n} " in shown for n in range(5)] == [True] * 4 + [False]


def test_metrics_of_every_api_server(server):
    found = settled_metrics(server)
    assert found["hits_total", "0", None] > 0
    # Every connection may reach another of the two.
    assert [metrics(server) for _ in range(10)] == [found] * 10
