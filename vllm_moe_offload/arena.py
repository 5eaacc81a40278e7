"""The slot arena: GPU memory for the experts in use.

Legend: S slots of a layer, B bytes of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_moe_offload.layout import ExpertLayout


class SlotArena:
    """One buffer that holds the slots of all layers, layer after layer.

    Args:
        layouts: the row of each layer.
        slots: the number of slots of each layer.
        device: where the buffer lives.
    """

    def __init__(
        self, layouts: Sequence[ExpertLayout], slots: Sequence[int], device: torch.device
    ) -> None:
        sizes = [count * layout.row_bytes for count, layout in zip(slots, layouts, strict=True)]
        self.buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        self._rows = [
            part.view(count, layout.row_bytes)
            for part, count, layout in zip(self.buffer.split(sizes), slots, layouts, strict=True)
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return self.buffer.numel()

    def rows(self, layer: int) -> Tensor:
        """The slots of a layer, uint8 [S, B]."""
        return self._rows[layer]

    def check_integrity(self) -> None:
        """Raise unless the layers' slots fill the buffer without a gap or an overlap."""
        end = self.buffer.data_ptr()
        for rows in self._rows:
            assert rows.numel() == 0 or rows.data_ptr() == end, "slots overlap or leave a gap"
            end += rows.numel()
        assert end == self.buffer.data_ptr() + self.num_bytes
