"""Take the host pool's memory ahead of the weights: on many threads, and near the GPU.

Memory is given page by page when it is first written, on the NUMA node of the thread that writes.
A weight loader writes with one thread, wherever that runs: it would clear a gigabyte or two a
second, and leave the GPU to read across the sockets' link.
"""

import ctypes
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from vllm_moe_offload.pcie import device_folder

_MADV_POPULATE_WRITE = 23
"""Since Linux 5.14; an older kernel refuses, and the memory is taken when it is written."""

PIECE = 256 << 20
"""Bytes that a thread takes at once, whole huge pages."""

MAX_THREADS = 16
"""More would wait for the kernel and for the memory."""


def populate(buffers: Iterable[Tensor], cpus: frozenset[int] | None = None) -> None:
    """Take the memory of buffers that nothing has been written to.

    Args:
        buffers: contiguous host tensors that begin at a page.
        cpus: run on these processors only; None for all that the process may use.
    """
    pieces = [
        (buffer.data_ptr() + start, min(PIECE, buffer.numel() * buffer.itemsize - start))
        for buffer in buffers
        for start in range(0, buffer.numel() * buffer.itemsize, PIECE)
    ]
    allowed = cpus or frozenset(os.sched_getaffinity(0))
    if not pieces:
        return
    threads = min(MAX_THREADS, len(allowed), len(pieces))
    with ThreadPoolExecutor(threads, initializer=_stay_on, initargs=(allowed,)) as pool:
        list(pool.map(_take, pieces))


def processors_near(address: str | None, root: Path = Path("/")) -> frozenset[int] | None:
    """Processors of the NUMA node that a device is attached to.

    Args:
        address: of the device on the bus, None if it is not on one.
        root: where ``sys`` is mounted.

    Returns:
        None if nothing is known, or if this process may use none of them.
    """
    if address is None:
        return None
    try:
        listed = (device_folder(address, root) / "local_cpulist").read_text()
        near = frozenset(_numbers(listed.strip()))
    except (OSError, ValueError):
        return None
    return near & frozenset(os.sched_getaffinity(0)) or None


def _numbers(listed: str) -> Iterable[int]:
    """Read the kernel's way of writing sets, such as ``0-3,8``."""
    for part in listed.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _stay_on(cpus: frozenset[int]) -> None:
    os.sched_setaffinity(0, cpus)


def _take(piece: tuple[int, int]) -> None:
    # ctypes lets other threads run meanwhile; the answer is not needed, see above.
    address, size = piece
    _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_WRITE)


_libc = ctypes.CDLL(None)
