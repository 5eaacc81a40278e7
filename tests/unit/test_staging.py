import pytest
import torch

from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.staging import Staging

PAGE = 4096
HOST = torch.device("cpu")


def layout(pages: int) -> ExpertLayout:
    return ExpertLayout.pack([("w", (pages * PAGE,), torch.uint8)])


@pytest.mark.parametrize(
    ("block_pages", "row_pages", "limit", "count"),
    [(6, 1, 99, 6), (6, 2, 99, 3), (6, 4, 99, 1), (6, 1, 4, 4), (6, 7, 99, 0), (0, 1, 99, 0)],
)
def test_rows_of_a_block(block_pages, row_pages, limit, count):
    staging = Staging(block_pages * PAGE, HOST)
    rows = staging.rows(1, layout(row_pages), limit=limit)
    assert rows.shape == (count, row_pages * PAGE)
    assert rows.is_contiguous()


def test_two_blocks_of_their_own():
    staging = Staging(2 * PAGE, HOST)
    assert len(staging.blocks) == Staging.NUM_BLOCKS == 2
    assert staging.num_bytes == 4 * PAGE
    first, second = (staging.rows(block, layout(1), limit=9) for block in range(2))
    first.fill_(1)
    second.fill_(2)
    assert int(first.sum()) == 2 * PAGE
    assert int(second.sum()) == 4 * PAGE


def test_layers_share_a_block():
    staging = Staging(4 * PAGE, HOST)
    narrow, wide = (staging.rows(0, layout(pages), limit=9) for pages in (1, 2))
    assert narrow.data_ptr() == wide.data_ptr() == staging.blocks[0].data_ptr()
