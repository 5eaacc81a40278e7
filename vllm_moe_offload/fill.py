"""Tell which expert tensors a weight loader has not written.

vLLM counts a layer's fused expert tensor as loaded once any expert of it was, so a checkpoint
that lacks one expert would be served with garbage. A few marks in every expert's tensors, put
there before loading and looked for after it, find the gap for every loader and every layout of
the checkpoint, and touch only a few pages.

Legend: E local experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MARKS = {
    # NaNs with a payload that no training run or conversion leaves behind; the 16-bit pattern
    # is a NaN as float16 and as bfloat16.
    2: (torch.int16, 0x7FDA),
    4: (torch.int32, 0x7FDA5A5A),
}


@dataclass(frozen=True)
class Gap:
    """A part of a tensor that nobody wrote: its expert and which half of the rows."""

    tensor: str
    expert: int
    half: int


def mark(views: dict[str, Tensor]) -> None:
    """Mark both halves of every floating-point tensor [E, rows, ...] of every expert."""
    for view in views.values():
        for probe, pattern in _probes(view):
            probe.fill_(pattern)


def gaps(views: dict[str, Tensor]) -> list[Gap]:
    """Find the marks that are still there."""
    return [
        Gap(name, int(expert), half)
        for name, view in views.items()
        for half, (probe, pattern) in enumerate(_probes(view))
        for expert in (probe == pattern).nonzero().flatten()
    ]


def _probes(view: Tensor) -> Iterator[tuple[Tensor, int]]:
    """One element of the first and of the second half of the rows, over all experts."""
    if view.ndim < 2 or not view.is_floating_point() or view.dtype.itemsize not in _MARKS:
        return
    integer, pattern = _MARKS[view.dtype.itemsize]
    bits = view.view(integer)
    for row in (0, view.shape[1] // 2):
        probe = bits[:, row]
        while probe.ndim > 1:
            probe = probe[..., 0]
        yield probe, pattern
