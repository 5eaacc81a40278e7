import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllm_moe_offload import pool as pool_module
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.pool import HostPool

MIB = 1 << 20
SMALL = ExpertLayout.pack([("w", (40,), torch.float32), ("b", (3,), torch.bfloat16)])
LARGE = ExpertLayout.pack([("w", (3000, 7), torch.float16)])
HOST = torch.device("cpu")


class FakeCudart:
    """Counts what is registered; refuses the calls whose number is given."""

    def __init__(self, refuse: tuple[int, ...] = ()) -> None:
        self.refuse = refuse
        self.calls: list[tuple[int, int, int]] = []
        self.pinned: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.calls.append((address, size, flags))
        if len(self.calls) - 1 in self.refuse:
            return 2
        self.pinned.append(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.pinned.remove(address)
        return 0


@pytest.fixture
def cudart(monkeypatch) -> FakeCudart:
    fake = FakeCudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return fake


@pytest.fixture
def pool(cudart) -> Iterator[HostPool]:
    pool = HostPool()
    for name, layout, experts in (("a", SMALL, 3), ("b", LARGE, 2), ("c", SMALL, 1)):
        pool.add(name, layout, experts)
    yield pool
    pool.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_rows_are_disjoint(pool):
    rows = [row for segment in pool.segments for row in segment.rows_EB]
    for number, row in enumerate(rows):
        row.fill_(number)
    assert all(bool((row == number).all()) for number, row in enumerate(rows))
    pool.check_integrity()


def test_row_of_a_layer_and_expert(pool):
    segment = pool.segments[0]
    segment.views()["w"][2, 39] = 1.5
    start = 39 * 4
    assert segment.rows_EB[2, start : start + 4].view(torch.float32).item() == 1.5
    assert pool.device_rows(segment, HOST).data_ptr() == segment.rows_EB.data_ptr()


def test_sizes(pool):
    assert [segment.num_bytes for segment in pool.segments] == [
        3 * SMALL.row_bytes, 2 * LARGE.row_bytes, SMALL.row_bytes,
    ]  # fmt: skip
    assert pool.num_bytes == sum(segment.num_bytes for segment in pool.segments)


def test_memory_is_taken_when_it_is_written():
    pool = HostPool()
    gc.collect()
    before = resident_bytes()
    rows_EB = pool.add("a", ExpertLayout.pack([("w", (64 * MIB,), torch.uint8)]), 32).rows_EB
    assert rows_EB.numel() == 2048 * MIB
    assert resident_bytes() - before < 16 * MIB
    rows_EB[3].fill_(1)
    assert 60 * MIB < resident_bytes() - before < 90 * MIB


def test_kernel_without_huge_pages(monkeypatch):
    class Memory(pool_module.mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(pool_module.mmap, "mmap", Memory)
    segment = HostPool().add("a", SMALL, 2)
    segment.rows_EB.fill_(7)
    assert segment.rows_EB.sum() == 7 * segment.num_bytes


def test_more_than_the_address_space(monkeypatch):
    layout = ExpertLayout.pack([("w", (1 << 42,), torch.uint8)])
    with pytest.raises(OffloadError) as error:
        HostPool().add("model.layers.3.mlp.experts", layout, 1 << 6)
    message = str(error.value)
    assert f"host pool = {1 << 48} bytes: " in message
    assert "model.layers.3.mlp.experts" in message
    assert "bytes that are available" in message
    assert "Free or add host memory" in message


def test_register(pool, cudart):
    pool.register(HOST)
    assert cudart.calls == [
        (segment.rows_EB.data_ptr(), segment.num_bytes, 2) for segment in pool.segments
    ]


def test_register_again_pins_only_what_is_new(pool, cudart):
    pool.register(HOST)
    added = pool.add("d", SMALL, 1)
    pool.register(HOST)
    assert len(cudart.calls) == 4
    assert cudart.calls[-1][0] == added.rows_EB.data_ptr()


@pytest.fixture
def room(monkeypatch):
    """Sets the bytes that are free on the GPU."""

    def give(free: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 1 << 40))

    return give


def test_layer_that_cannot_be_pinned_is_held_by_the_gpu(pool, cudart, room):
    cudart.refuse = (1,)
    a, b, c = pool.segments
    b.rows_EB.random_(256)
    room(b.num_bytes)
    assert pool.register(HOST) == b.num_bytes
    assert cudart.pinned == [a.rows_EB.data_ptr(), c.rows_EB.data_ptr()]
    for rows_EB in (pool.device_rows(b, HOST), pool.source_rows(b)):
        assert rows_EB.data_ptr() != b.rows_EB.data_ptr()
        assert torch.equal(rows_EB, b.rows_EB)
    for segment in (a, c):
        assert pool.device_rows(segment, HOST) is pool.source_rows(segment) is segment.rows_EB
    # What is held is not tried again.
    assert pool.register(HOST) == b.num_bytes
    assert len(cudart.calls) == 3
    pool.close()
    assert cudart.pinned == []
    assert pool.device_rows(b, HOST) is b.rows_EB


def test_layer_that_can_be_neither_pinned_nor_held(pool, cudart, room):
    cudart.refuse = (1, 2)
    held = sum(segment.num_bytes for segment in pool.segments[1:])
    room(held - 1)
    with pytest.raises(OffloadError) as error:
        pool.register(HOST)
    message = str(error.value)
    assert f"host pool = {pool.num_bytes} bytes: " in message
    assert "the experts of b (error 2); of 3 layers 1 could be pinned" in message
    assert f"the {held} bytes of the others do not fit into the {held - 1} bytes" in message
    assert "ulimit -l unlimited" in message
    assert "memlock=-1" in message
    assert cudart.pinned == []


def test_refusal_is_not_reported_again_by_the_next_launch(pool, cudart, room, monkeypatch):
    """CUDA remembers its last error until somebody asks for it."""
    cudart.refuse = (0,)
    room(1 << 30)
    launches = []

    def zeros(*_args, **_kwargs):
        launches.append(len(cudart.calls))
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    assert pool.register(HOST) == pool.segments[0].num_bytes
    assert launches == [3], "asked once, after the last refusal"


def test_close_unpins_once(pool, cudart):
    pool.register(HOST)
    assert len(cudart.pinned) == 3
    pool.close()
    assert cudart.pinned == []
    pool.close()


def test_memory_outlives_close_while_it_is_viewed(pool):
    view = pool.segments[0].views()["w"]
    view.fill_(2)
    pool.close()
    pool.segments.clear()
    gc.collect()
    assert view.sum() == 2 * view.numel()


def test_forgotten_pool_is_unpinned(cudart):
    pool = HostPool()
    pool.add("a", SMALL, 1)
    pool.register(HOST)
    assert len(cudart.pinned) == 1
    del pool
    gc.collect()
    assert cudart.pinned == []


def test_close_without_registration_needs_no_cuda(pool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("CUDA was asked"))
    pool.close()


def test_integrity_notices_an_overlap(pool):
    pool.segments.append(pool.segments[1])
    with pytest.raises(AssertionError, match="overlap"):
        pool.check_integrity()
