"""The arithmetic of the boundary: every byte has one tenant, whatever is lent."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.layout import ROW_ALIGNMENT, ExpertLayout
from vllm_moe_offload.lending.boundary import Boundary, floor_blocks
from vllm_moe_offload.lending.rows import borrowed_rows

PAGE = ROW_ALIGNMENT


@st.composite
def boundaries(draw, max_blocks: int = 200) -> Boundary:
    num_blocks = draw(st.integers(2, max_blocks))
    return Boundary(
        num_blocks=num_blocks,
        block_bytes=draw(st.sampled_from((96, 4096, 4100, 10_000, 3 * PAGE))),
        row_bytes=tuple(PAGE * pages for pages in draw(st.lists(st.integers(1, 4), min_size=1,
                                                                max_size=4))),
        floor_blocks=draw(st.integers(1, num_blocks)),
        most_slots=draw(st.integers(0, 12)),
        least_increments=draw(st.integers(0, 3)),
    )  # fmt: skip


@given(boundaries())
def test_rows_lie_in_the_lent_blocks_and_nowhere_twice(boundary):
    tenants = {}
    for increments in range(1, boundary.max_increments + 1):
        (slot,) = boundary.slots(increments - 1, increments)
        first_byte = boundary.first_block(increments) * boundary.block_bytes
        for layer, size in enumerate(boundary.row_bytes):
            offset = boundary.row_offset(layer, slot)
            assert first_byte <= offset
            assert offset + size <= boundary.num_blocks * boundary.block_bytes
            assert offset % PAGE == 0
            for page in range(offset // PAGE, (offset + size) // PAGE):
                assert tenants.setdefault(page, (layer, slot)) == (layer, slot)
    # No gap either, and nothing below the boundary.
    assert len(tenants) * PAGE == boundary.max_increments * boundary.increment_bytes
    if tenants:
        assert max(tenants) - min(tenants) + 1 == len(tenants)


@given(boundaries())
def test_no_block_is_given_away_that_rows_do_not_need(boundary):
    for increments in range(1, boundary.max_increments + 1):
        used = sum(len(boundary.blocks(i, i + 1)) for i in range(increments))
        assert used == boundary.num_blocks - boundary.first_block(increments)
        # Rounded to blocks below, and to a page above.
        spare = used * boundary.block_bytes - increments * boundary.increment_bytes
        assert 0 <= spare < boundary.block_bytes + PAGE


@given(boundaries())
def test_the_floor_holds_and_one_more_would_break_it(boundary):
    most = boundary.max_increments
    assert boundary.first_block(most) >= boundary.floor_blocks
    assert boundary.min_increments <= most
    if most < boundary.most_slots:
        needed = (most + 1) * boundary.increment_bytes + boundary.floor_blocks * (
            boundary.block_bytes
        )
        assert needed > boundary.num_blocks * boundary.block_bytes - PAGE


@given(boundaries())
def test_slots_are_equally_far_apart(boundary):
    for layer in range(len(boundary.row_bytes)):
        offsets = [boundary.row_offset(layer, s) for s in range(boundary.max_increments)]
        steps = {b - a for a, b in pairwise(offsets)}
        assert steps <= {boundary.increment_bytes}


@pytest.mark.parametrize(
    ("num_blocks", "sequence", "share", "expected"),
    [
        (1000, 64, 0.1, 165),
        (110, 10, 0.1, 22),  # 0.1 * 110 is a little more than 11 in binary
        (110, 10, 0.101, 23),
        (100, 10, 0.0, 11),
        (100, 10, 1.0, 100),
        (100, 99, 0.0, 100),
        (100, 500, 0.1, 100),
    ],
)
def test_floor(num_blocks, sequence, share, expected):
    assert floor_blocks(num_blocks, sequence, share) == expected


def test_known_boundary():
    # Qwen3-30B-A3B in 16 bits: 48 layers of 9.44 MB experts; 1.5 MiB a block of 16 tokens.
    boundary = Boundary(
        num_blocks=13_600,
        block_bytes=48 * 16 * 2 * 4 * 128 * 2,
        row_bytes=(9_437_184,) * 48,
        floor_blocks=floor_blocks(13_600, 40_960 // 16, 0.1),
        most_slots=128,
    )
    assert boundary.increment_bytes == 288 * boundary.block_bytes
    assert boundary.floor_blocks == 1 + 2560 + 1360
    assert boundary.max_increments == (13_600 - 3921) // 288 == 33
    assert boundary.blocks(0, 2) == range(13_600 - 576, 13_600)
    assert boundary.slots(0, 2) == range(31, 33)


@given(boundaries(max_blocks=60), st.booleans())
def test_borrowed_rows(boundary, signed):
    size = boundary.num_blocks * boundary.block_bytes
    buffer = torch.zeros(size, dtype=torch.int8 if signed else torch.uint8)
    expected = torch.zeros(size, dtype=torch.uint8)
    for layer, row_bytes in enumerate(boundary.row_bytes):
        rows = borrowed_rows(buffer, boundary, layer)
        assert rows.shape == (boundary.max_increments, row_bytes)
        for slot in range(boundary.max_increments):
            value = 1 + (layer * 7 + slot) % 200
            rows[slot] = value
            start = boundary.row_offset(layer, slot)
            expected[start : start + row_bytes] = value
    assert torch.equal(buffer.view(torch.uint8), expected)


def test_borrowed_rows_are_viewed_as_weights():
    layout = ExpertLayout.pack([("w13", (8, 4), torch.bfloat16), ("s", (3,), torch.float32)])
    boundary = Boundary(50, 1000, (layout.row_bytes, 2 * PAGE), 1, 8)
    buffer = torch.zeros(50_000, dtype=torch.int8)
    rows = borrowed_rows(buffer, boundary, 0)
    views = layout.views(rows)
    views["s"].fill_(1.5)
    assert views["w13"].shape == (boundary.max_increments, 8, 4)
    assert boundary.max_increments == 3
    held = torch.stack([
        buffer.view(torch.uint8)[boundary.row_offset(0, slot) :][:layout.row_bytes]
        for slot in range(3)
    ])  # fmt: skip
    assert torch.equal(held, rows)
    assert bool(held.any(1).all())
