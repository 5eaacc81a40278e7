"""Sorts the routed (token, choice) pairs by expert, in blocks that hold one expert each.

A grouped matrix product takes one block of rows at a time, so a block must not mix experts.

Legend: T tokens, K choices a token, E local experts, P pairs (T K), M pairs of a block,
C chunks of pairs.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from vllm_moe_offload.kernels._dispatch_triton import count_kernel, place_kernel

PAIRS_PER_PROGRAM = 512
"""Pairs a program sorts: enough programs for a prefill, few enough counts to add up."""

RANK_CHUNK = 128
"""Pairs compared with each other at once; a square of comparisons that fits the registers."""

COUNTS_AT_ONCE = 4096
"""Counts of earlier chunks that a program holds at once, to hide the latency of reading them."""


@dataclass(frozen=True)
class Dispatch:
    """Pairs by expert, in buffers of fixed size with the number of blocks on the device.

    Block ``b`` holds the pairs ``sorted_pair[b M : (b + 1) M]`` (int32, ``t K + k``), all of
    expert ``expert_of_block[b]`` (int32), in ascending order and filled up with ``P``. Blocks
    are in ascending order of the expert; entries past ``num_blocks`` (int32, one element) are
    undefined. ``count_CE`` (int32) is scratch.
    """

    sorted_pair: Tensor
    expert_of_block: Tensor
    num_blocks: Tensor
    count_CE: Tensor
    block_m: int

    @classmethod
    def empty(
        cls, num_pairs: int, num_experts: int, block_m: int, device: torch.device
    ) -> "Dispatch":
        """Buffers for up to ``num_pairs`` pairs, in blocks of ``block_m``."""
        blocks = max_blocks(num_pairs, num_experts, block_m)

        def int32(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        return cls(
            sorted_pair=int32(blocks * block_m),
            expert_of_block=int32(blocks),
            num_blocks=int32(1),
            count_CE=int32(_num_chunks(num_pairs), num_experts),
            block_m=block_m,
        )

    @property
    def num_experts(self) -> int:
        """Local experts of the layer."""
        return self.count_CE.shape[1]


def max_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Most blocks that any routing of ``num_pairs`` pairs can fill."""
    active = min(num_pairs, num_experts)
    return active + (num_pairs - active) // block_m


def dispatch_torch(ids_TK: Tensor, lists: Dispatch) -> None:
    """Sort the active pairs by expert.

    Args:
        ids_TK: routed local expert ids, any integer type; negative ids are inactive.
        lists: overwritten in place.
    """
    ids = ids_TK.reshape(-1).long()
    active = torch.nonzero(ids >= 0).flatten()
    pairs = active[torch.argsort(ids[active], stable=True)]
    count_E = torch.bincount(ids[active], minlength=lists.num_experts)
    blocks_E = (count_E + lists.block_m - 1) // lists.block_m
    first_E = (blocks_E.cumsum(0) - blocks_E) * lists.block_m
    rank = (
        torch.arange(pairs.numel(), device=ids.device) - (count_E.cumsum(0) - count_E)[ids[pairs]]
    )

    num_blocks = int(blocks_E.sum())
    lists.sorted_pair[: num_blocks * lists.block_m] = ids.numel()
    lists.sorted_pair[first_E[ids[pairs]] + rank] = pairs.int()
    experts = torch.arange(lists.num_experts, dtype=torch.int32, device=ids.device)
    lists.expert_of_block[:num_blocks] = experts.repeat_interleave(blocks_E)
    lists.num_blocks.fill_(num_blocks)


def dispatch(ids_TK: Tensor, lists: Dispatch) -> None:
    """Do what ``dispatch_torch`` does, in two launches of many programs.

    The first counts the experts of each chunk of pairs, the second adds up the counts of the
    chunks before its own: no atomics, so the order is the same in every run.
    """
    num_pairs, num_experts = ids_TK.numel(), lists.num_experts
    grid = (_num_chunks(num_pairs),)
    padded = max(32, triton.next_power_of_2(num_experts))
    ids = ids_TK.reshape(-1)
    count_kernel[grid](
        ids, num_pairs, lists.count_CE, E=num_experts, E2=padded, PAIRS=PAIRS_PER_PROGRAM
    )
    place_kernel[grid](
        ids, num_pairs, lists.count_CE,
        lists.sorted_pair, lists.expert_of_block, lists.num_blocks,
        E=num_experts, E2=padded, PAIRS=PAIRS_PER_PROGRAM, RANK_CHUNK=RANK_CHUNK,
        COUNT_ROWS=max(1, COUNTS_AT_ONCE // padded), BLOCK_M=lists.block_m,
    )  # fmt: skip


def _num_chunks(num_pairs: int) -> int:
    # No pairs are one empty chunk: somebody has to write that there are no blocks.
    return max(1, -(-num_pairs // PAIRS_PER_PROGRAM))
