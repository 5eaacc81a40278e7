"""The boundary in the KV cache's buffer: which blocks are vLLM's, which bytes are expert slots.

One buffer of N blocks, block-outermost, so that block ``b`` is the bytes from ``b * block_bytes``
on. Blocks below the boundary belong to vLLM, those from it on to experts. The boundary moves by
increments; an increment is one more row for every layer::

    0                 first_block(2)     first_block(1)     N
    | vLLM's blocks ... | increment 1      | increment 0      |
                        | layer 0 | 1 | .. | layer 0 | 1 | .. |

How kernels address a slot. An increment holds the rows of all layers side by side, and one
increment ends where the next begins. So the rows of one layer, whatever the sizes of the others,
are equally far apart: ``address = base(layer) + slot * increment_bytes``, with slot 0 in the
lowest increment that may ever be lent. That is one base pointer, one row number and one constant
row stride, which is all that ``gather`` and ``expert_mlp`` know of a slot arena today: no table of
row offsets, no second base, and nothing in a captured graph depends on where the boundary is.
Lending opens slots from the highest number downwards and never renumbers one.

There is no second place for slots. What a model keeps even when requests need all they can get
are the topmost increments, ``least_increments``, never handed back. A separate arena would need
a second base, or a distance to the buffer that is a multiple of the stride: up to one slot a
layer wasted.

Increments are packed without a gap, so a block may hold the end of one and the start of the next;
it belongs to experts as long as either is lent.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from vllm_moe_offload.layout import ROW_ALIGNMENT

NULL_BLOCKS = 1
"""vLLM keeps block 0 for itself: it stands for "no block" in block tables."""


def floor_blocks(num_blocks: int, sequence_blocks: int, share: float) -> int:
    """Blocks that experts never get.

    Args:
        num_blocks: of the whole buffer.
        sequence_blocks: that one sequence of the greatest length takes, drafts included.
        share: of the buffer, on top of that; 0 to 1.

    Returns:
        At most ``num_blocks``.
    """
    # A share such as 0.1 of 110 blocks must not gain a block by binary rounding.
    extra = math.ceil(share * num_blocks - 1e-6)
    return min(num_blocks, NULL_BLOCKS + sequence_blocks + extra)


@dataclass(frozen=True)
class Boundary:
    """Where increments lie in the buffer. Pure arithmetic on ids and bytes.

    Args:
        num_blocks: blocks of the buffer, N.
        block_bytes: bytes of one block, all its layers together.
        row_bytes: bytes of one expert of each offloaded layer.
        floor_blocks: blocks that stay vLLM's, see ``floor_blocks``.
        most_slots: slots that a layer can use at most: the experts of the largest layer.
        least_increments: increments that stay with experts, as far as the floor allows.
    """

    num_blocks: int
    block_bytes: int
    row_bytes: tuple[int, ...]
    floor_blocks: int
    most_slots: int
    least_increments: int = 0

    def __post_init__(self) -> None:
        assert self.row_bytes, "no layer is offloaded"
        assert all(size > 0 and size % ROW_ALIGNMENT == 0 for size in self.row_bytes)
        assert NULL_BLOCKS <= self.floor_blocks <= self.num_blocks
        assert self.block_bytes > 0

    @cached_property
    def increment_bytes(self) -> int:
        """Bytes of one row of every layer; the distance between two slots of a layer."""
        return sum(self.row_bytes)

    @cached_property
    def max_increments(self) -> int:
        """Most increments that leave vLLM its floor; also the slots of each layer."""
        room = max(0, self._end - self.floor_blocks * self.block_bytes)
        return min(self.most_slots, room // self.increment_bytes)

    @cached_property
    def min_increments(self) -> int:
        """Increments that are never handed back."""
        return min(self.least_increments, self.max_increments)

    def first_block(self, increments: int) -> int:
        """First block id that is not vLLM's while so many increments are lent."""
        assert 0 <= increments <= self.max_increments
        if increments == 0:
            return self.num_blocks
        return (self._end - increments * self.increment_bytes) // self.block_bytes

    def blocks(self, lower: int, upper: int) -> range:
        """Ids that change hands between ``lower`` and ``upper`` lent increments."""
        return range(self.first_block(upper), self.first_block(lower))

    def slots(self, lower: int, upper: int) -> range:
        """Slots of every layer that open or close between ``lower`` and ``upper`` increments."""
        assert 0 <= lower <= upper <= self.max_increments
        return range(self.max_increments - upper, self.max_increments - lower)

    def row_offset(self, layer: int, slot: int) -> int:
        """Where a slot's row begins, in bytes from the start of the buffer."""
        assert 0 <= slot < self.max_increments
        return self._layer_offsets[layer] + slot * self.increment_bytes

    @cached_property
    def _layer_offsets(self) -> list[int]:
        bottom = self._end - self.max_increments * self.increment_bytes
        return list(accumulate(self.row_bytes[:-1], initial=bottom))

    @cached_property
    def _end(self) -> int:
        """Where the topmost increment ends: the last aligned byte of the buffer."""
        return self.num_blocks * self.block_bytes // ROW_ALIGNMENT * ROW_ALIGNMENT
