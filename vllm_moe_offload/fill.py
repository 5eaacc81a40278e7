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

_CODES = 0x7F5AC3E1_96D20B7F
"""Eight bytes for tensors of codes: a NaN at both ends if they are e4m3."""


@dataclass(frozen=True)
class Gap:
    """A part of a tensor that nobody wrote: its expert and which half of the rows."""

    tensor: str
    expert: int
    half: int


def mark(views: dict[str, Tensor], transposed: frozenset[str] = frozenset()) -> None:
    """Mark both halves of every tensor [E, rows, ...] of every expert.

    Args:
        views: tensors by name, as the loader fills them.
        transposed: names of tensors that hold their halves side by side.
    """
    for name, view in views.items():
        for probe, pattern in _probes(view, beside=name in transposed):
            probe.fill_(pattern)


def gaps(views: dict[str, Tensor], transposed: frozenset[str] = frozenset()) -> list[Gap]:
    """Find the marks that are still there."""
    return [
        Gap(name, int(expert), half)
        for name, view in views.items()
        for half, (probe, pattern) in enumerate(_probes(view, beside=name in transposed))
        for expert in (probe == pattern).nonzero().flatten()
    ]


def _probes(view: Tensor, *, beside: bool) -> Iterator[tuple[Tensor, int]]:
    """The first place of either half that can hold a mark, over all experts."""
    if view.ndim < 2:
        return
    if view.is_floating_point() and view.dtype.itemsize in _MARKS:
        integer, pattern = _MARKS[view.dtype.itemsize]
        bits = view.view(integer)
    else:
        # Any value of a code is possible, eight chosen bytes in a row are not.
        if view.shape[-1] * view.dtype.itemsize % 8:
            return
        bits, pattern = view.view(torch.int64), _CODES
    axis = bits.ndim - 1 if beside else 1
    for place in (0, bits.shape[axis] // 2):
        probe = bits.select(axis, place)
        while probe.ndim > 1:
            probe = probe[..., 0]
        yield probe, pattern
