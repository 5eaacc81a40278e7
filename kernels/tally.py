"""Counts what a sweep reads, which leaves the tables as they are: what resolve counts elsewhere.

Legend: T tokens, K choices a token, E local experts.
"""

import torch
from torch import Tensor

from vllm_moe_offload.kernels._tally_triton import tally_kernel
from vllm_moe_offload.kernels.dispatch import Dispatch
from vllm_moe_offload.kernels.resolve import Counter

BLOCKS_AT_ONCE = 512
"""Blocks of pairs that a program looks at together: those of a step of 8192 tokens in two turns."""


def tally_torch(
    ids_TK: Tensor,
    slot_of_E: Tensor,
    counters: Tensor,
    moved: int,
    *,
    dispatch: Dispatch | None = None,
) -> None:
    """Add a step's experts to a layer's counters, without waiting for the device.

    Args:
        ids_TK: routed local expert ids, any integer type; negative ids are inactive.
        slot_of_E: int32 [E], slot of each expert, or -1.
        counters: int64, by ``Counter``; added to. An active expert with a slot is a hit, one
            without is streamed, and what was moved besides is surplus.
        moved: experts that the step has moved.
        dispatch: the same pairs sorted by expert, of which only the Triton form makes use.
    """
    del dispatch
    # One place more than there are experts takes the inactive ids.
    active = torch.zeros(slot_of_E.numel() + 1, dtype=torch.bool, device=ids_TK.device)
    # An assignment would bring its value from the host, and wait for that.
    active.index_fill_(0, (ids_TK.reshape(-1) + 1).long(), True)
    active_E = active[1:]
    num_active, num_hits = active_E.sum(), (active_E & (slot_of_E >= 0)).sum()
    streams = num_active - num_hits
    counters[Counter.ACTIVE] += num_active
    counters[Counter.HITS] += num_hits
    counters[Counter.STREAMS] += streams
    counters[Counter.SURPLUS] += moved - streams


def tally(
    ids_TK: Tensor,
    slot_of_E: Tensor,
    counters: Tensor,
    moved: int,
    *,
    dispatch: Dispatch | None = None,
) -> None:
    """Do what ``tally_torch`` does, in one launch over the sorted pairs."""
    del ids_TK
    assert dispatch is not None, "the pairs have to be sorted"
    tally_kernel[(1,)](
        dispatch.expert_of_block, dispatch.num_blocks, slot_of_E, counters, moved,
        BLOCKS=BLOCKS_AT_ONCE,
    )  # fmt: skip
