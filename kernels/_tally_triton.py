# mypy: ignore-errors
"""Triton body of ``tally``.

Legend: E local experts. BLOCKS of pairs are looked at together.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["moved"], do_not_specialize_on_alignment=["slot_of_E"])
def tally_kernel(
    expert_of_block, num_blocks, slot_of_E, counters, moved, BLOCKS: tl.constexpr
):  # fmt: skip
    """Count the experts of a step whose pairs are sorted: where a block's expert changes is one."""
    count = tl.load(num_blocks)
    active_B = tl.zeros([BLOCKS], tl.int32)
    hit_B = tl.zeros([BLOCKS], tl.int32)
    for first in range(0, count, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        expert = tl.load(expert_of_block + block, mask=block < count, other=-1)
        before = tl.load(expert_of_block + block - 1, mask=(block > 0) & (block < count), other=-1)
        is_first = expert != before
        slot = tl.load(slot_of_E + expert, mask=is_first, other=-1)
        active_B += is_first.to(tl.int32)
        hit_B += (slot >= 0).to(tl.int32)
    num_active, num_hits = tl.sum(active_B, 0), tl.sum(hit_B, 0)
    num_streams = num_active - num_hits
    # Active, hits, loads, streams and surplus, in one store: nobody reads half of it.
    counter = tl.arange(0, 8)
    steps = tl.where(counter == 0, num_active, tl.where(counter == 1, num_hits, 0))
    steps = tl.where(counter == 3, num_streams, steps)
    steps = tl.where(counter == 4, moved - num_streams, steps)
    totals = tl.load(counters + counter, mask=counter < 5, other=0)
    # Every thread has read the counters before any thread writes them.
    tl.debug_barrier()
    tl.store(counters + counter, totals + steps, mask=counter < 5)
