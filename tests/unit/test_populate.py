import ctypes
import mmap
import os

import pytest
import torch

from vllm_moe_offload import populate as module
from vllm_moe_offload.populate import populate, processors_near

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None)


def reserved(num_bytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.uint8)


def pages_taken(buffer: torch.Tensor) -> int:
    pages = buffer.numel() // PAGE
    present = (ctypes.c_ubyte * pages)()
    address = ctypes.c_void_p(buffer.data_ptr())
    assert libc.mincore(address, ctypes.c_size_t(buffer.numel()), present) == 0
    return sum(page & 1 for page in present)


def test_memory_is_taken(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 8 * PAGE)
    buffers = [reserved(pages * PAGE) for pages in (1, 8, 9, 64)]
    assert [pages_taken(buffer) for buffer in buffers] == [0, 0, 0, 0]
    populate(buffers)
    assert [pages_taken(buffer) for buffer in buffers] == [1, 8, 9, 64]
    assert all(int(buffer.sum()) == 0 for buffer in buffers)


def test_threads_stay_where_they_are_told_and_the_caller_is_free():
    before = os.sched_getaffinity(0)
    populate([reserved(4 * PAGE)], frozenset({min(before)}))
    assert os.sched_getaffinity(0) == before


def test_nothing_to_take():
    populate([])
    populate([torch.empty(0, dtype=torch.uint8)])


def folder(tmp_path, listed: str):
    place = tmp_path / "sys/bus/pci/devices/0000:3b:00.0"
    place.mkdir(parents=True)
    (place / "local_cpulist").write_text(listed)
    return tmp_path


@pytest.mark.parametrize(
    ("listed", "near"),
    [("0-3,8\n", {0, 1, 8}), ("0\n", {0}), ("4-6\n", None), ("\n", None), ("x\n", None)],
)
def test_processors_near_a_device(tmp_path, monkeypatch, listed, near):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 8, 9})
    found = processors_near("0000:3B:00.0", folder(tmp_path, listed))
    assert found == (None if near is None else frozenset(near))


def test_unknown_devices(tmp_path):
    assert processors_near(None) is None
    assert processors_near("0000:00:00.0", tmp_path) is None
