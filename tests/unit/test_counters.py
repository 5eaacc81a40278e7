"""Reading counters beside the steps of another thread."""

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vllm_moe_offload.counters import READINGS, Counters
from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.kernels.resolve import Counter, ResidencyTables
from vllm_moe_offload.residency import Residency

HOST = torch.device("cpu")
SECONDS = [0.5, 0.25, 2.0]


def make_layer(name: str, experts: int, slots: int) -> SimpleNamespace:
    layout = SimpleNamespace(row_bytes=100 * experts)
    spec = SimpleNamespace(name=name, num_experts=experts, layout=layout)
    return SimpleNamespace(
        spec=spec, residency=Residency(ResidencyTables.empty(experts, slots, HOST)), is_held=False
    )


def count(layer: SimpleNamespace, **counts: int) -> None:
    for name, value in counts.items():
        layer.residency.work.counters[Counter[name.upper()]] += value


def test_every_layer_gets_its_own_counts():
    layers = [make_layer("a", 4, 2), make_layer("b", 8, 0), make_layer("c", 6, 6)]
    count(layers[0], active=5, hits=2, loads=2, streams=1, surplus=7)
    count(layers[2], active=1, loads=1)
    layers[2].residency.tables.expert_of_S[3] = 5
    counters = Counters(layers, HOST, SECONDS[: len(layers)])
    expected = [
        LayerCounts("a", 4, 2, 400, 0, 5, 2, 2, 1, 7, row_seconds=0.5),
        LayerCounts("b", 8, 0, 800, 0, 0, 0, 0, 0, 0, row_seconds=0.25),
        LayerCounts("c", 6, 6, 600, 1, 1, 0, 1, 0, 0, row_seconds=2.0),
    ]
    assert counters.read() == counters.snapshot() == expected
    count(layers[1], active=1, streams=1)
    assert counters.read()[1] == replace(expected[1], active=1, streams=1)


def test_reading_that_is_torn_for_good():
    layer = make_layer("a", 4, 2)
    count(layer, active=3, hits=1)
    counters = Counters([layer], HOST, SECONDS[:1])
    assert counters.snapshot() is None
    assert counters.read()[0].active == 3


def test_torn_reading_is_made_again(monkeypatch):
    layer = make_layer("a", 4, 2)
    count(layer, active=3, hits=1)
    counters = Counters([layer], HOST, SECONDS[:1])
    original, readings = counters._read, []

    def read(**kwargs):
        readings.append(1)
        if len(readings) == READINGS:
            count(layer, loads=2)  # the step has come to its end
        return original(**kwargs)

    monkeypatch.setattr(counters, "_read", read)
    assert counters.snapshot() == [LayerCounts("a", 4, 2, 400, 0, 3, 1, 2, 0, 0, row_seconds=0.5)]


def test_snapshots_beside_steps_are_whole():
    layers = [make_layer(str(number), 4, 2) for number in range(3)]
    counters, stop = Counters(layers, HOST, SECONDS[: len(layers)]), threading.Event()

    def step() -> None:
        while not stop.is_set():
            for layer in layers:
                count(layer, active=2, hits=1, loads=1)

    thread = threading.Thread(target=step)
    thread.start()
    try:
        snapshots = [counters.snapshot() for _ in range(200)]
    finally:
        stop.set()
        thread.join()
    whole = [counts for counts in snapshots if counts is not None]
    assert whole
    assert all(layer.is_whole for counts in whole for layer in counts)
    totals = [sum(layer.active for layer in counts) for counts in whole]
    assert totals == sorted(totals)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
def test_snapshot_does_not_wait_for_the_steps():
    device = torch.device("cuda")
    layer = make_layer("a", 4, 2)
    layer.residency = Residency(ResidencyTables.empty(4, 2, device))
    counters = Counters([layer], device, SECONDS[:1])
    counters.snapshot()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    layer.residency.work.counters[Counter.ACTIVE] += 1
    layer.residency.work.counters[Counter.HITS] += 1
    assert counters.snapshot()[0].active == 0
    assert not torch.cuda.current_stream().query()
    assert counters.read()[0].active == 1
