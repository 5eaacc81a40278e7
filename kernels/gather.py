"""Move expert rows from the host pool into slots or staging.

Legend: N entries of a list, B bytes of a row.
"""

import torch
from torch import Tensor

from vllm_moe_offload.kernels._gather_triton import gather_kernel

PROGRAMS = 32
"""Programs of one launch. Together they keep half a megabyte in flight, several times what the
bus holds at a time, and leave three quarters of a large GPU's multiprocessors to compute."""

PIECE_WORDS = 2048
"""Words of 8 bytes that a program moves at once: 16 KiB, four 16-byte loads a thread."""

NUM_WARPS = 8


def gather_torch(
    source: Tensor,
    target: Tensor,
    source_row_N: Tensor,
    target_row_N: Tensor | None,
    length: Tensor,
    *,
    first: int = 0,
    limit: int | None = None,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Copy the rows that a work list names.

    Entry ``n`` of the list copies row ``source_row_N[n]`` of ``source`` to row
    ``target_row_N[n]`` of ``target``, or to row ``n - first`` where ``target_row_N`` is None.

    Args:
        source: uint8 [rows, B], the host pool's rows of one layer.
        target: uint8 [rows, B], slots or a staging block.
        source_row_N: int32 [N].
        target_row_N: int32 [N] or None.
        length: int32 [1], how many entries of the list are valid.
        first: first entry to copy.
        limit: copy at most this many entries; None for all.
        part: of the entries that are left copy those from ``part / parts`` up to
            ``(part + 1) / parts`` of their number, rounded down.
        parts: how many parts together are all.
    """
    stop = min(int(length), source_row_N.numel())
    if limit is not None:
        stop = min(stop, first + limit)
    entries = max(0, stop - first)
    for n in range(first + entries * part // parts, first + entries * (part + 1) // parts):
        row = n - first if target_row_N is None else int(target_row_N[n])
        target[row].copy_(source[int(source_row_N[n])], non_blocking=True)


def gather(
    source: Tensor,
    target: Tensor,
    source_row_N: Tensor,
    target_row_N: Tensor | None,
    length: Tensor,
    *,
    first: int = 0,
    limit: int | None = None,
    part: int = 0,
    parts: int = 1,
    programs: int = PROGRAMS,
) -> None:
    """Do what ``gather_torch`` does, in one launch that the host never waits for.

    ``source`` may be host memory that is mapped into the device's address space. Rows are whole
    words of 8 bytes and begin at multiples of 16. ``programs`` is the size of the launch,
    whatever the length of the list.
    """
    assert source.shape[1] == target.shape[1], "source and target differ in bytes a row"
    stop = source_row_N.numel() if limit is None else min(source_row_N.numel(), first + limit)
    if target.shape[0] == 0 or stop <= first:
        return
    source_words, target_words = source.view(torch.int64), target.view(torch.int64)
    gather_kernel[(programs,)](
        source_words, target_words, source_row_N, target_row_N, length, first, stop,
        part, parts, source_words.stride(0), target_words.stride(0),
        ROW_WORDS=source_words.shape[1], PIECE=PIECE_WORDS, num_warps=NUM_WARPS,
    )  # fmt: skip
