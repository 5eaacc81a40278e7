# mypy: ignore-errors
"""Triton bodies of ``dispatch``, and the pieces of it that ``resolve`` shares.

Legend: E local experts, P pairs (T tokens times K choices), M pairs of a block, C chunks of pairs.
Capitals without a tensor before them are compile-time sizes; E2 is E rounded up to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def load_ids(ids, pair, stop, E: tl.constexpr):
    """Load routed ids as int32, with -1 for whatever is inactive or at ``stop`` and past it."""
    expert = tl.load(ids + pair, mask=pair < stop, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, -1).to(tl.int32)


@triton.jit
def count_experts(expert, E2: tl.constexpr):
    """Count how often each expert occurs among ids with -1 for inactive ones."""
    # Masked entries are zeroed as well, so that no bin outside the range is ever computed.
    return tl.histogram(tl.maximum(expert, 0), E2, mask=expert >= 0)


@triton.jit
def first_blocks(count_E, BLOCK_M: tl.constexpr):
    """Return each expert's first block and how many blocks it has."""
    blocks_E = (count_E + (BLOCK_M - 1)) // BLOCK_M
    return tl.cumsum(blocks_E, 0) - blocks_E, blocks_E


@triton.jit
def write_blocks(
    count_E, first_E, blocks_E, num_pairs, sorted_pair, expert_of_block, num_blocks,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Name every block's expert, and fill the places that no pair takes."""
    expert = tl.arange(0, count_E.shape[0])
    tl.store(num_blocks, tl.sum(blocks_E, 0))
    for block in range(tl.max(blocks_E, 0)):
        tl.store(expert_of_block + first_E + block, expert, mask=block < blocks_E)
    end_E = (first_E + blocks_E) * BLOCK_M
    padding_E = first_E * BLOCK_M + count_E
    for place in range(BLOCK_M):
        padded = padding_E + place < end_E
        tl.store(sorted_pair + padding_E + place, num_pairs, mask=padded)


@triton.jit
def place_pairs(
    ids, start, stop, place_E, sorted_pair,
    E: tl.constexpr, E2: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write the pairs ``start .. stop`` to their experts' next places, in ascending order."""
    lane = tl.arange(0, CHUNK)
    earlier = lane[None, :] < lane[:, None]
    for first in range(start, stop, CHUNK):
        expert = load_ids(ids, first + lane, stop, E)
        same = expert[:, None] == expert[None, :]
        rank = tl.sum((same & earlier).to(tl.int32), 1)
        place = tl.gather(place_E, tl.maximum(expert, 0), 0) + rank
        tl.store(sorted_pair + place, first + lane, mask=expert >= 0)
        # In decode all pairs are one chunk, behind which nobody asks for the next places.
        if first + CHUNK < stop:
            place_E += count_experts(expert, E2)


@triton.jit(do_not_specialize=["num_pairs"])
def count_kernel(
    ids, num_pairs, count_CE,
    E: tl.constexpr, E2: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Count the experts of one chunk."""
    chunk = tl.program_id(0)
    count_E = count_experts(load_ids(ids, chunk * PAIRS + tl.arange(0, PAIRS), num_pairs, E), E2)
    expert = tl.arange(0, E2)
    tl.store(count_CE + chunk * E + expert, count_E, mask=expert < E)


@triton.jit(do_not_specialize=["num_pairs"])
def place_kernel(
    ids, num_pairs, count_CE, sorted_pair, expert_of_block, num_blocks,
    E: tl.constexpr, E2: tl.constexpr, PAIRS: tl.constexpr, RANK_CHUNK: tl.constexpr,
    COUNT_ROWS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Place the pairs of one chunk; the first program also lays out the blocks."""
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    expert, row = tl.arange(0, E2), tl.arange(0, COUNT_ROWS)
    count_E = tl.zeros([E2], tl.int32)
    earlier_E = tl.zeros([E2], tl.int32)
    for first in range(0, num_chunks, COUNT_ROWS):
        inside = (first + row < num_chunks)[:, None] & (expert < E)[None, :]
        count = tl.load(
            count_CE + (first + row)[:, None] * E + expert[None, :], mask=inside, other=0
        )
        count_E += tl.sum(count, 0)
        earlier_E += tl.sum(tl.where((first + row < chunk)[:, None], count, 0), 0)
    first_E, blocks_E = first_blocks(count_E, BLOCK_M)
    if chunk == 0:
        write_blocks(
            count_E, first_E, blocks_E, num_pairs, sorted_pair, expert_of_block, num_blocks,
            BLOCK_M,
        )  # fmt: skip
    start = chunk * PAIRS
    stop = tl.minimum(start + PAIRS, num_pairs)
    place_pairs(ids, start, stop, first_E * BLOCK_M + earlier_E, sorted_pair, E, E2, RANK_CHUNK)
