"""How the tensors of one expert are packed into one row of bytes.

Legend: R rows (experts, slots or staging rows).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

TENSOR_ALIGNMENT = 256
"""Bytes; enough for any vector load and for the tensor-core copy engines."""

ROW_ALIGNMENT = 4096
"""Bytes; a page, so that a row can also be read from a file past the page cache."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an expert: where it lies in the row and what it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Size without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ExpertLayout:
    """The packed row of one expert: weights, scales, zero points and biases side by side."""

    tensors: tuple[TensorSpec, ...]
    row_bytes: int

    @classmethod
    def pack(cls, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]]) -> "ExpertLayout":
        """Lay tensors out one after the other, each aligned, in the order given."""
        specs: list[TensorSpec] = []
        end = 0
        for name, shape, dtype in tensors:
            specs.append(TensorSpec(name, tuple(shape), dtype, _round_up(end, TENSOR_ALIGNMENT)))
            end = specs[-1].offset + specs[-1].num_bytes
        return cls(tuple(specs), _round_up(end, ROW_ALIGNMENT))

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors alone, without padding."""
        return sum(spec.num_bytes for spec in self.tensors)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """View every tensor over all rows.

        Args:
            rows: uint8 [R, row_bytes], each contiguous; rows may be further apart than their
                size, by a multiple of ``ROW_ALIGNMENT``.

        Returns:
            By name a strided [R, *shape] tensor that shares the memory of ``rows``.
        """
        assert rows.dtype == torch.uint8
        assert rows.shape[1:] == (self.row_bytes,)
        assert rows.stride(1) == 1
        assert rows.shape[0] <= 1 or rows.stride(0) % ROW_ALIGNMENT == 0
        return {spec.name: self._view(rows, spec) for spec in self.tensors}

    def _view(self, rows: Tensor, spec: TensorSpec) -> Tensor:
        size = spec.dtype.itemsize
        typed = rows.view(spec.dtype)
        strides = [math.prod(spec.shape[i + 1 :]) for i in range(len(spec.shape))]
        return typed.as_strided(
            (rows.shape[0], *spec.shape),
            (typed.stride(0), *strides),
            typed.storage_offset() + spec.offset // size,
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
