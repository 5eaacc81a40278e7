"""Staging: two blocks of rows through which experts without a slot pass.

Legend: R rows of a block, B bytes of a row.
"""

import torch
from torch import Tensor

from vllm_moe_offload.layout import ExpertLayout


class Staging:
    """Two equal blocks, shared by all layers, so that one loads while the other is read.

    Args:
        block_bytes: size of one block, zero if every expert has a slot.
        device: where the blocks live.
    """

    NUM_BLOCKS = 2

    def __init__(self, block_bytes: int, device: torch.device) -> None:
        self.blocks = [
            torch.empty(block_bytes, dtype=torch.uint8, device=device)
            for _ in range(self.NUM_BLOCKS)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of both blocks."""
        return sum(block.numel() for block in self.blocks)

    def rows(self, block: int, layout: ExpertLayout, *, limit: int) -> Tensor:
        """A block as rows of a layer, uint8 [R, B] with R at most ``limit``."""
        count = min(limit, self.blocks[block].numel() // layout.row_bytes)
        return self.blocks[block][: count * layout.row_bytes].view(count, layout.row_bytes)
