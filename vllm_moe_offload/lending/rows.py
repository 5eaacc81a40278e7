"""The slots of a layer inside the KV cache's buffer, as kernels take them.

Legend: S slots of a layer, B bytes of a row.
"""

import torch
from torch import Tensor

from vllm_moe_offload.lending.boundary import Boundary


def borrowed_rows(buffer: Tensor, boundary: Boundary, layer: int) -> Tensor:
    """View every slot that a layer may ever borrow.

    Args:
        buffer: the KV cache's whole buffer, one-dimensional, of any one-byte type.
        boundary: where increments lie in it.
        layer: number of the offloaded layer.

    Returns:
        uint8 [S, B] that shares the buffer's memory, with a row stride of ``increment_bytes``.
        Which of the slots may be used now is up to the tables: see ``Residencies.open_from``.
    """
    assert buffer.dim() == 1
    assert buffer.numel() * buffer.itemsize >= boundary.num_blocks * boundary.block_bytes
    slots, row_bytes = boundary.max_increments, boundary.row_bytes[layer]
    if slots == 0:
        return buffer.new_empty((0, row_bytes), dtype=torch.uint8)
    bytes_ = buffer.view(torch.uint8)
    first = bytes_.storage_offset() + boundary.row_offset(layer, 0)
    return bytes_.as_strided((slots, row_bytes), (boundary.increment_bytes, 1), first)
