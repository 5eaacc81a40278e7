# mypy: ignore-errors
"""Triton body of ``gather``. Legend: N entries of the list; a word is 8 bytes."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first", "stop", "part", "parts"])
def gather_kernel(
    source, target, source_row_N, target_row_N, length, first, stop, part, parts,
    source_stride, target_stride,
    ROW_WORDS: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Deal the pieces of all rows round to the programs, so that one row keeps all of them busy."""
    pieces: tl.constexpr = (ROW_WORDS + PIECE - 1) // PIECE
    entries = tl.maximum(tl.minimum(tl.load(length), stop) - first, 0)
    begin, end = entries * part // parts * pieces, entries * (part + 1) // parts * pieces
    for piece in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        entry = piece // pieces
        word = piece % pieces * PIECE + tl.arange(0, PIECE)
        source_row = tl.load(source_row_N + first + entry).to(tl.int64)
        if target_row_N is None:
            target_row = tl.zeros_like(source_row) + entry
        else:
            target_row = tl.load(target_row_N + first + entry).to(tl.int64)
        inside = word < ROW_WORDS
        # Nothing reads the host's copy again soon: leave the cache to the weights in use.
        words = tl.load(
            source + source_row * source_stride + word, mask=inside, eviction_policy="evict_first"
        )
        tl.store(target + target_row * target_stride + word, words, mask=inside)
