"""Bytes moved, as the scheduler hears of them."""

from types import SimpleNamespace

import pytest
import torch

from vllm_moe_offload import traffic
from vllm_moe_offload.kernels.resolve import Counter
from vllm_moe_offload.traffic import MOVED, Traffic

HOST = torch.device("cpu")


def layer(row_bytes: int, *, is_held: bool = False) -> SimpleNamespace:
    counters = torch.zeros(len(Counter), dtype=torch.int64)
    return SimpleNamespace(
        spec=SimpleNamespace(layout=SimpleNamespace(row_bytes=row_bytes)),
        residency=SimpleNamespace(work=SimpleNamespace(counters=counters)),
        is_held=is_held,
    )


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(traffic.time, "monotonic", lambda: now[0])
    return now


def test_what_crossed_the_link_is_counted_by_the_layers_rows(clock):
    layers = [layer(1000), layer(30), layer(7, is_held=True)]
    counted = Traffic(layers, [0.5, 0.015, 0.0], HOST)
    for each in layers:
        each.residency.work.counters[:] = torch.arange(1, len(Counter) + 1)
    moved = sum(1 + int(counter) for counter in MOVED)
    assert counted.num_bytes() == 0, "nothing has been asked for yet"
    assert counted.num_bytes() == moved * 1030
    assert counted.bytes_per_second == pytest.approx(1037 / 0.515)


def test_a_reading_is_kept_for_a_while(clock):
    part = layer(10)
    counted = Traffic([part], [1.0], HOST)
    counted.num_bytes()
    part.residency.work.counters[Counter.LOADS] = 3
    assert counted.num_bytes() == 0
    clock[0] += 2 * traffic.PERIOD_S
    counted.num_bytes()
    assert counted.num_bytes() == 30


def test_no_rate_where_nothing_is_ever_moved():
    assert Traffic([layer(10, is_held=True)], [0.0], HOST).bytes_per_second == 0.0
