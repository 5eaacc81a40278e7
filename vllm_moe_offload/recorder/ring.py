"""Ring: a bounded queue of small tensors on the device, which one thread fills and one empties."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16

_NUMPY = {torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64}


@dataclass(slots=True)
class _Part:
    """One tensor of an entry: bytes of the ring, and how to read them."""

    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(slots=True)
class _Entry:
    tag: Any
    parts: list[_Part]
    end: int
    stream: torch.cuda.Stream | None
    """Where the copies into the ring are queued."""


class DeviceRing:
    """Tensors wait here until the host has time for them.

    An entry lies in one piece, and what is left over at the end of the ring is skipped. Where
    nothing waits there is room for whatever the ring can hold at all, see ``entry_bytes``.

    Offsets grow for ever and wrap around when they are used, so that the one that fills and the
    one that empties each write one number and need no lock.

    Args:
        num_bytes: room for all that waits.
        device: where the ring lives; the host itself is allowed.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        on_gpu = device.type == "cuda"
        self._host = torch.empty_like(self._buffer, device="cpu", pin_memory=True) if on_gpu else (
            self._buffer
        )  # fmt: skip
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._entries: deque[_Entry] = deque()
        self._written = 0
        self._read = 0

    @property
    def num_bytes(self) -> int:
        """Room for all that waits."""
        return self._buffer.numel()

    @property
    def waiting_bytes(self) -> int:
        """Room that is taken."""
        # What was skipped where nothing waited comes on top of what an entry takes.
        return min(self._written - self._read, self.num_bytes)

    def put(self, tag: Any, tensors: Sequence[Tensor]) -> bool:
        """Queue copies of tensors on the current stream, or do nothing if there is no room.

        Args:
            tag: comes back with the copies.
            tensors: of integers, of any strides.

        Returns:
            Whether there was room.
        """
        parts, end = self._place(tensors)
        if not self._has_room(parts, end):
            return False
        for part, tensor in zip(parts, tensors, strict=True):
            target = self._buffer[part.start : part.stop].view(part.dtype)
            target.view(part.shape).copy_(tensor)
        stream = None if self._stream is None else torch.cuda.current_stream(self._device)
        self._written = end
        self._entries.append(_Entry(tag, parts, end, stream))
        return True

    def take(self) -> list[tuple[Any, list[NDArray[Any]]]]:
        """Return all that waits, each entry with its tensors; waits for the device."""
        entries = [self._entries.popleft() for _ in range(len(self._entries))]
        if not entries:
            return []
        self._fetch(entries)
        host = self._host.numpy()
        taken = [(entry.tag, [_read(host, part) for part in entry.parts]) for entry in entries]
        self._read = entries[-1].end
        return taken

    def _place(self, tensors: Sequence[Tensor]) -> tuple[list[_Part], int]:
        """Lay tensors out behind what was written last, in one piece."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        total = entry_bytes(sizes)
        start = self._written % self.num_bytes
        skipped = self.num_bytes - start if start + total > self.num_bytes else 0
        start = 0 if skipped else start
        parts = []
        for tensor, size in zip(tensors, sizes, strict=True):
            parts.append(_Part(start, start + size, tensor.dtype, tuple(tensor.shape)))
            start += _aligned(size)
        return parts, self._written + skipped + total

    def _has_room(self, parts: Sequence[_Part], end: int) -> bool:
        if not parts:
            return True
        if self._written == self._read:
            # Nobody reads any byte of the ring, so that those skipped are free as well.
            return _aligned(parts[-1].stop) <= self.num_bytes
        return end - self._read <= self.num_bytes

    def _fetch(self, entries: Sequence[_Entry]) -> None:
        """Bring the bytes of the entries to the host in as few copies as possible."""
        if self._stream is None:
            return
        for stream in {entry.stream for entry in entries if entry.stream is not None}:
            self._stream.wait_stream(stream)
        with torch.cuda.stream(self._stream):
            for start, stop in _runs([part for entry in entries for part in entry.parts]):
                self._host[start:stop].copy_(self._buffer[start:stop], non_blocking=True)
        self._stream.synchronize()


def entry_bytes(sizes: Iterable[int]) -> int:
    """Bytes that an entry takes whose tensors have these sizes."""
    return sum(_aligned(size) for size in sizes)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _runs(parts: Sequence[_Part]) -> list[tuple[int, int]]:
    """Join parts that follow each other."""
    runs: list[tuple[int, int]] = []
    for part in parts:
        if runs and part.start == _aligned(runs[-1][1]):
            runs[-1] = (runs[-1][0], part.stop)
        else:
            runs.append((part.start, part.stop))
    return runs


def _read(host: NDArray[np.uint8], part: _Part) -> NDArray[Any]:
    # A copy: the room is given back before the array is used.
    return host[part.start : part.stop].copy().view(_NUMPY[part.dtype]).reshape(part.shape)
