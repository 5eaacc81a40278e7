"""Staging: a buffer of rows through which experts without a slot pass.

Legend: R rows of a block, B bytes of a row.
"""

import torch
from torch import Tensor

from vllm_moe_offload.layout import ROW_ALIGNMENT, ExpertLayout
from vllm_moe_offload.sizes import MIB

MIN_BLOCKS, MAX_BLOCKS = 4, 10
"""Blocks of a sweep: with more of them less of the buffer waits for the block in use to be done,
with fewer of them the products of a layer take fewer launches."""

BLOCK_BYTES = 56 * MIB
"""Of a block between these bounds: PCIe 5.0 takes a millisecond, and the host a fraction of that to
launch what is computed from it. With half as much a slow host is the last to be ready."""


class Staging:
    """One buffer, shared by all layers, that is cut in two ways.

    A sweep cuts it into many small ``blocks``, so that copies run ahead of the computation by
    nearly the whole buffer: attention over a long context takes longer than a few experts. A
    step that loads and computes in turn cuts it into two ``halves``, for the fewest waves.

    Args:
        num_bytes: size of the buffer, zero if every expert has a slot.
        largest_row: bytes of the largest row that passes; two of them fit.
        device: where the buffer lives.
    """

    def __init__(self, num_bytes: int, largest_row: int, device: torch.device) -> None:
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.halves = self._cut(2)
        wanted = max(MIN_BLOCKS, min(MAX_BLOCKS, num_bytes // BLOCK_BYTES))
        self.blocks = self._cut(max(2, min(wanted, num_bytes // max(1, largest_row))))

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel()

    def _cut(self, count: int) -> list[Tensor]:
        size = self.num_bytes // count // ROW_ALIGNMENT * ROW_ALIGNMENT
        return [self.buffer[size * i : size * (i + 1)] for i in range(count)]


def rows_of(block: Tensor, layout: ExpertLayout, *, limit: int) -> Tensor:
    """View a block as rows of a layer, uint8 [R, B] with R at most ``limit``."""
    count = min(limit, block.numel() // layout.row_bytes)
    return block[: count * layout.row_bytes].view(count, layout.row_bytes)
