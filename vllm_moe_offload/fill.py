"""Tell which expert tensors a weight loader has not written.

vLLM counts a layer's fused expert tensor as loaded once any expert of it was, so a checkpoint
that lacks one expert would be served with garbage. A few marks in every expert's tensors, put
there before loading and looked for after it, find the gap for every loader and every layout of
the checkpoint, and touch only a few pages.

Legend: E local experts, V values and B bytes of a tensor of one expert.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MARKS = {
    # NaNs with a payload that no training run or conversion leaves behind; the 16-bit pattern
    # is a NaN as float16 and as bfloat16.
    2: bytes.fromhex("DA7F"),
    4: bytes.fromhex("5A5ADA7F"),
}

_CODES = bytes.fromhex("7F0BD296E1C35A7F")
"""For tensors of codes: any value of a code is possible, eight chosen bytes in a row are not. A NaN
at both ends if they are e4m3."""


@dataclass(frozen=True)
class Gap:
    """A part of a tensor that nobody wrote: its expert and which half of the rows."""

    tensor: str
    expert: int
    half: int


def mark(views: dict[str, Tensor], transposed: frozenset[str] = frozenset()) -> None:
    """Mark both halves of every tensor [E, ...] of every expert.

    Args:
        views: tensors by name, as the loader fills them.
        transposed: names of tensors that hold their halves side by side.
    """
    for name, view in views.items():
        for probe_EB, pattern in _probes(view, beside=name in transposed):
            probe_EB.copy_(pattern)


def gaps(views: dict[str, Tensor], transposed: frozenset[str] = frozenset()) -> list[Gap]:
    """Find the marks that are still there."""
    return [
        Gap(name, int(expert), half)
        for name, view in views.items()
        for half, (probe_EB, pattern) in enumerate(_probes(view, beside=name in transposed))
        for expert in (probe_EB == pattern).all(1).nonzero().flatten()
    ]


def _probes(view: Tensor, *, beside: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The first bytes of either half over all experts, and the mark that they can hold."""
    size = view.dtype.itemsize
    mark = _MARKS.get(size, _CODES) if view.is_floating_point() else _CODES
    flat_EV = view[:, None] if view.ndim == 1 else view.view(view.shape[0], -1)
    bytes_EB = flat_EV.view(torch.uint8)
    rows = 1 if view.ndim == 1 else view.shape[1]
    second = view.shape[-1] // 2 if beside else rows // 2 * (flat_EV.shape[1] // rows)
    for first in dict.fromkeys((0, second * size)):
        if first + len(mark) <= bytes_EB.shape[1]:
            pattern = torch.frombuffer(bytearray(mark), dtype=torch.uint8)
            yield bytes_EB[:, first : first + len(mark)], pattern
