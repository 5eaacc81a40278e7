"""What both layouts are, and how a cost comes out of times; attention itself needs a GPU."""

import kv_layout_cost
import pytest
import torch
from kv_layout_cost import CASES, LAYERS, D, H, N, layouts, measure_layouts, random_pages, row_of

BLOCKS = 5
BLOCK_ITEMS = N * H * 2 * D


@pytest.fixture(scope="module")
def caches():
    return layouts(torch.arange(BLOCKS * LAYERS * BLOCK_ITEMS, dtype=torch.int32), BLOCKS)


def test_both_layouts_are_the_same_memory(caches):
    inner, outer = caches["layers outermost"], caches["blocks outermost"]
    assert inner.shape == outer.shape == (LAYERS, BLOCKS, N, H, 2 * D)
    assert inner.data_ptr() == outer.data_ptr()
    assert torch.equal(inner.sum((0, 1)), outer.sum((0, 1)))


@pytest.mark.parametrize(
    ("name", "layer_stride", "block_stride"),
    [("layers outermost", BLOCKS * BLOCK_ITEMS, BLOCK_ITEMS),
     ("blocks outermost", BLOCK_ITEMS, LAYERS * BLOCK_ITEMS)],
)  # fmt: skip
def test_what_lies_side_by_side(caches, name, layer_stride, block_stride):
    cache = caches[name]
    assert cache.stride()[:2] == (layer_stride, block_stride)
    assert cache[0, 0].is_contiguous()


@pytest.mark.parametrize(("batch", "context"), CASES)
def test_no_block_is_two_sequences(batch, context):
    blocks = max(b * c for b, c in CASES) // N
    table = random_pages(batch, context, blocks)
    assert table.shape == (batch, context // N)
    assert table.unique().numel() == table.numel()
    assert 0 <= int(table.min()) < int(table.max()) < blocks
    # Blocks that follow one another would hide what a stride costs.
    assert int((table.diff() == 1).sum()) < table.numel() / 100
    assert torch.equal(table, random_pages(batch, context, blocks))


def test_cost_is_of_medians():
    row = row_of({"layers outermost": [2.0, 9.0, 4.0], "blocks outermost": [5.0, 1.0, 5.0]})
    assert row["seconds"] == {"layers outermost": 4.0, "blocks outermost": 5.0}
    assert row["cost"] == 1.25


def test_nothing_is_claimed_where_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kv_layout_cost, "_graph", lambda *_: pytest.fail("a graph on a CPU"))
    assert measure_layouts(tiny=False) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert measure_layouts(tiny=True) == []
