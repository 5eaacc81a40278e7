"""The host pool: every routed expert of the worker, one row an expert.

A step takes rows straight out of pinned memory, by addresses that it finds itself: the host cannot
help it to rows that are not pinned. Where the system refuses to pin a layer, that layer's rows are
held by the GPU instead, as long as it has the memory.

Legend: E local experts of a layer, B bytes of a row.
"""

import contextlib
import mmap
import weakref
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.memory import available_host_memory

_REGISTER_MAPPED = 2
"""``cudaHostRegisterMapped``: the GPU may read the memory by its own address."""


@dataclass(frozen=True)
class PoolSegment:
    """The rows of one layer."""

    name: str
    layout: ExpertLayout
    rows_EB: Tensor
    """uint8 on the host."""
    filled_as: ExpertLayout
    """The row as the weight loader fills it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return self.rows_EB.numel()

    def views(self) -> dict[str, Tensor]:
        """By name every tensor of the layer as [E, ...] over the rows."""
        return self.layout.views(self.rows_EB)

    def filled_views(self) -> dict[str, Tensor]:
        """By name every tensor as the weight loader fills it, over the same rows."""
        return self.filled_as.views(self.rows_EB)


class HostPool:
    """Owns the memory of all segments.

    The memory is anonymous and takes huge pages where the kernel offers them. It is registered
    with CUDA once the weights are in; PyTorch's own pinned allocator is not used because it
    rounds every allocation up to a power of two.
    """

    def __init__(self) -> None:
        self.segments: list[PoolSegment] = []
        self._registered: list[int] = []
        self._on_device: dict[int, Tensor] = {}
        self._finalizer = weakref.finalize(self, _unregister, self._registered)

    @property
    def num_bytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.num_bytes for segment in self.segments)

    def storages(self) -> set[int]:
        """Addresses of the storages of all segments: a tensor in one of these is in the pool."""
        return {segment.rows_EB.untyped_storage().data_ptr() for segment in self.segments}

    def add(
        self,
        name: str,
        layout: ExpertLayout,
        num_experts: int,
        filled_as: ExpertLayout | None = None,
    ) -> PoolSegment:
        """Reserve the rows of one layer. Memory is taken when it is first written.

        Args:
            name: of the layer, for messages.
            layout: of a row.
            num_experts: rows.
            filled_as: how the weight loader fills a row, if it is not as ``layout`` says.

        Raises:
            OffloadError: the system refuses the address space.
        """
        memory = _reserve(name, num_experts * layout.row_bytes)
        rows_EB = torch.frombuffer(memory, dtype=torch.uint8).view(num_experts, layout.row_bytes)
        self.segments.append(PoolSegment(name, layout, rows_EB, filled_as or layout))
        return self.segments[-1]

    def register(self, device: torch.device) -> int:
        """Pin all rows and map them into the GPU's address space, or copy them to it. Idempotent.

        Args:
            device: the GPU. It holds the rows of layers that CUDA refuses to pin.

        Returns:
            Bytes of its memory that hold such rows.

        Raises:
            OffloadError: they do not fit. Nothing is pinned any more.
        """
        refused = [segment for segment in self.segments if not self._is_ready(segment)]
        # A smaller layer may be pinned after a larger one was refused.
        statuses = {segment.name: self._pin(segment) for segment in refused}
        refused = [segment for segment in refused if statuses[segment.name]]
        if not refused:
            return self._bytes_on_device()
        _forget_error(device)
        needed, free = sum(s.num_bytes for s in refused), torch.cuda.mem_get_info(device)[0]
        if needed > free:
            pinned = len(self._registered)
            self.close()
            raise OffloadError(
                "host pool",
                f"{self.num_bytes} bytes",
                f"CUDA refused to pin the experts of {refused[0].name} (error "
                f"{statuses[refused[0].name]}); of {len(self.segments)} layers {pinned} could be "
                f"pinned, and the {needed} bytes of the others do not fit into the {free} bytes "
                "that are free on the GPU",
                "Raise the limit on locked memory (ulimit -l unlimited, docker run --ulimit "
                f"memlock=-1) to {self.num_bytes} bytes or more, free host memory, or lower "
                "gpu_gb or cache_fraction to leave the GPU room",
            )
        for segment in refused:
            self._on_device[segment.rows_EB.data_ptr()] = segment.rows_EB.to(device, copy=True)
        return self._bytes_on_device()

    def is_held(self, segment: PoolSegment) -> bool:
        """Whether the GPU holds a layer's rows."""
        return segment.rows_EB.data_ptr() in self._on_device

    def device_rows(self, segment: PoolSegment, device: torch.device) -> Tensor:
        """A layer's rows as the device addresses them; they must be registered."""
        held = self._on_device.get(segment.rows_EB.data_ptr())
        if held is not None:
            return held
        if device.type == "cpu":
            return segment.rows_EB
        return torch.as_tensor(_MappedRows(segment.rows_EB), device=device)

    def source_rows(self, segment: PoolSegment) -> Tensor:
        """A layer's rows as the copy engine reads them: pinned, or on the GPU."""
        return self._on_device.get(segment.rows_EB.data_ptr(), segment.rows_EB)

    def _is_ready(self, segment: PoolSegment) -> bool:
        address = segment.rows_EB.data_ptr()
        return address in self._registered or address in self._on_device

    def _pin(self, segment: PoolSegment) -> int:
        """Register a layer; CUDA's status, 0 for success."""
        address = segment.rows_EB.data_ptr()
        status = torch.cuda.cudart().cudaHostRegister(address, segment.num_bytes, _REGISTER_MAPPED)
        if int(status) == 0:
            self._registered.append(address)
        return int(status)

    def _bytes_on_device(self) -> int:
        return sum(rows_EB.numel() for rows_EB in self._on_device.values())

    def close(self) -> None:
        """Unpin the memory; it is freed with the last tensor that views it."""
        self._on_device.clear()
        self._finalizer()

    def check_integrity(self) -> None:
        """Raise unless the segments are disjoint and every row is whole."""
        spans = sorted((segment.rows_EB.data_ptr(), segment.num_bytes) for segment in self.segments)
        for (start, size), (following, _) in pairwise(spans):
            assert start + size <= following, "two segments of the host pool overlap"
        for segment in self.segments:
            assert segment.rows_EB.shape[1] == segment.layout.row_bytes


def _reserve(name: str, num_bytes: int) -> mmap.mmap:
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise OffloadError(
            "host pool",
            f"{num_bytes} bytes",
            f"the system refused this memory to the experts of {name} ({error.strerror}), of the "
            f"{available_host_memory().available} bytes that are available",
            "Free or add host memory, or use a checkpoint with smaller experts",
        ) from error
    # A kernel without huge pages refuses the advice, and small pages work as well.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class _MappedRows:
    """Hands host memory that CUDA has mapped to PyTorch under its device address."""

    def __init__(self, rows_EB: Tensor) -> None:
        self._rows_EB = rows_EB
        self.__cuda_array_interface__ = {
            "shape": tuple(rows_EB.shape),
            "typestr": "|u1",
            # Unified addressing: a registered address is the same on host and device.
            "data": (rows_EB.data_ptr(), False),
            "version": 3,
        }


def _forget_error(device: torch.device) -> None:
    """Take the refusal that CUDA remembers, or the next kernel's launch would report it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


def _unregister(addresses: list[int]) -> None:
    while addresses:
        torch.cuda.cudart().cudaHostUnregister(addresses.pop())
