import pytest
import torch

from vllm_moe_offload import staging as module
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.staging import MAX_BLOCKS, MIN_BLOCKS, Staging, rows_of

PAGE = 4096
HOST = torch.device("cpu")


def layout(pages: int) -> ExpertLayout:
    return ExpertLayout.pack([("w", (pages * PAGE,), torch.uint8)])


@pytest.mark.parametrize(
    ("block_pages", "row_pages", "limit", "count"),
    [(6, 1, 99, 6), (6, 2, 99, 3), (6, 4, 99, 1), (6, 1, 4, 4), (6, 7, 99, 0), (0, 1, 99, 0)],
)
def test_rows_of_a_block(block_pages, row_pages, limit, count):
    block = torch.empty(block_pages * PAGE, dtype=torch.uint8)
    rows = rows_of(block, layout(row_pages), limit=limit)
    assert rows.shape == (count, row_pages * PAGE)
    assert rows.is_contiguous()


@pytest.mark.parametrize(
    ("pages", "row_pages", "blocks"),
    [
        (2, 1, 2), (3, 1, 3), (5, 2, 2), (7, 2, 3), (0, 0, 2),
        (30, 1, MIN_BLOCKS), (70, 1, 7), (70, 12, 5), (200, 1, MAX_BLOCKS),
    ],
)  # fmt: skip
def test_every_block_holds_the_largest_row(pages, row_pages, blocks, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 10 * PAGE)
    staging = Staging(pages * PAGE, row_pages * PAGE, HOST)
    assert len(staging.blocks) == blocks
    assert len(staging.halves) == 2
    for block in (*staging.blocks, *staging.halves):
        assert block.numel() >= row_pages * PAGE
        assert block.data_ptr() % 64 == 0


@pytest.mark.parametrize("cut", ["halves", "blocks"])
def test_no_two_blocks_share_a_byte(cut):
    staging = Staging(23 * PAGE, 2 * PAGE, HOST)
    staging.buffer.zero_()
    blocks = getattr(staging, cut)
    for block in blocks:
        block.add_(1)
    assert int(staging.buffer.max()) == 1
    assert int(staging.buffer.sum()) == sum(block.numel() for block in blocks)


def test_layers_share_a_block():
    staging = Staging(8 * PAGE, 2 * PAGE, HOST)
    narrow, wide = (rows_of(staging.blocks[0], layout(pages), limit=9) for pages in (1, 2))
    assert narrow.data_ptr() == wide.data_ptr() == staging.buffer.data_ptr()
