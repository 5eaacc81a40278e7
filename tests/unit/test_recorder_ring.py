import threading
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.recorder import recorder
from vllm_moe_offload.recorder.ring import DeviceRing
from vllm_moe_offload.step_log import StepLog

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param


def put(ring, tag, size):
    device = ring._buffer.device
    tensors = [torch.full((size, 2), tag, dtype=torch.int16, device=device),
               torch.arange(size, dtype=torch.int64, device=device)]  # fmt: skip
    return ring.put(tag, tensors[: 1 + tag % 2])


def check(tag, size, arrays):
    assert len(arrays) == 1 + tag % 2
    assert arrays[0].tolist() == [[tag, tag]] * size
    assert arrays[0].dtype == np.int16
    if tag % 2:
        assert arrays[1].tolist() == list(range(size))


@given(st.data())
def test_first_in_first_out_within_bounds(data):
    device = data.draw(st.sampled_from(DEVICES))
    ring = DeviceRing(data.draw(st.integers(16, 400)), device)
    waiting = []
    for tag in range(40):
        size = data.draw(st.integers(0, 12))
        if put(ring, tag, size):
            waiting.append((tag, size))
        assert ring.waiting_bytes <= ring.num_bytes
        if data.draw(st.integers(0, 3)) == 0:
            taken = ring.take()
            assert [tag for tag, _ in taken] == [tag for tag, _ in waiting]
            for (_, arrays), (number, count) in zip(taken, waiting, strict=True):
                check(number, count, arrays)
            waiting = []
            assert ring.waiting_bytes == 0


@given(st.data())
def test_an_empty_ring_takes_whatever_it_can_hold(data):
    """Wherever the last entry ended, and nothing is lost or written over behind it."""
    device = data.draw(st.sampled_from(DEVICES))
    ring = DeviceRing(data.draw(st.integers(16, 400)), device)
    for tag in range(data.draw(st.integers(0, 12))):
        if put(ring, tag, data.draw(st.integers(0, 12))) and data.draw(st.booleans()):
            ring.take()
    ring.take()
    room = ring.num_bytes // 16 * 16
    last = torch.arange(room, dtype=torch.int64, device=device).to(torch.int16)[: room // 2]
    assert ring.put("last", [last])
    assert ring.waiting_bytes <= ring.num_bytes
    assert ring.put("tag", []), "what has no tensor always fits"
    assert not ring.put("more", [last[:1]])
    (tag, (taken,)), (other, _) = ring.take()
    assert (tag, other) == ("last", "tag")
    assert taken.tolist() == last.tolist()
    assert ring.waiting_bytes == 0
    assert put(ring, 1, 0), "it goes on"


@given(st.data())
def test_the_largest_step_fits_the_recorders_ring_whenever_it_is_empty(data):
    """Also with a position for every token, and twice if the ring is at its beginning."""
    layers, tokens, top_k = (data.draw(st.integers(1, most)) for most in (4, 20, 3))
    device = data.draw(st.sampled_from(DEVICES))
    log = StepLog(layers, tokens, top_k, device)
    with mock.patch.object(recorder, "RING_BYTES", 1):
        ring = DeviceRing(recorder._ring_bytes(log), device)
    positions_T = torch.arange(tokens, device=device)

    def put(count, with_positions):
        tensors = [log.tokens(count), positions_T[:count]]
        return ring.put(None, tensors[: 1 + with_positions])

    assert put(tokens, True)
    assert put(tokens, True)
    ring.take()
    steps = st.tuples(st.integers(1, tokens), st.booleans())
    for step in data.draw(st.lists(steps, max_size=20)):
        assert put(*step)
        ring.take()
    assert put(tokens, True)


def test_full(device):
    ring = DeviceRing(64, device)
    row = torch.zeros(16, dtype=torch.int16, device=device)
    assert ring.put("a", [row])
    assert ring.put("b", [row])
    assert not ring.put("c", [row])
    assert ring.put("d", []), "what has no tensor always fits"
    assert [tag for tag, _ in ring.take()] == ["a", "b", "d"]
    assert ring.put("e", [row])


def test_larger_than_the_ring(device):
    ring = DeviceRing(64, device)
    assert not ring.put("a", [torch.zeros(100, dtype=torch.int16, device=device)])
    assert ring.take() == []


def test_takes_copies(device):
    ring = DeviceRing(1024, device)
    row = torch.arange(4, dtype=torch.int16, device=device)
    ring.put("a", [row])
    row.zero_()
    ((_, (taken,)),) = ring.take()
    ring.put("b", [row])
    assert taken.tolist() == [0, 1, 2, 3]


def test_a_step_log(device):
    log = StepLog(3, 5, 2, device)
    log.ids_LTK.copy_(torch.arange(30).view(3, 5, 2))
    ring = DeviceRing(4096, device)
    ring.put(None, [log.tokens(2)])
    ((_, (ids_TLK,)),) = ring.take()
    assert ids_TLK.tolist() == [[[0, 1], [10, 11], [20, 21]], [[2, 3], [12, 13], [22, 23]]]


@pytest.mark.parametrize("num_bytes", [160, 2048])
def test_two_threads(device, num_bytes):
    """Also where the largest entries take nearly all of the ring."""
    ring = DeviceRing(num_bytes, device)
    taken, dropped, done = [], [], threading.Event()

    def consume():
        while not done.is_set() or ring.waiting_bytes:
            taken.extend(ring.take())

    thread = threading.Thread(target=consume)
    thread.start()
    for tag in range(3000):
        if not put(ring, tag % 1000, tag % 13):
            dropped.append(tag)
    done.set()
    thread.join()
    taken.extend(ring.take())
    kept = [tag for tag in range(3000) if tag not in set(dropped)]
    assert [tag for tag, _ in taken] == [tag % 1000 for tag in kept]
    for (tag, arrays), number in zip(taken, kept, strict=True):
        check(tag, number % 13, arrays)
