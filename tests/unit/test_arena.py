import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.arena import SlotArena
from vllm_moe_offload.layout import ExpertLayout

HOST = torch.device("cpu")


def layout(pages: int) -> ExpertLayout:
    return ExpertLayout.pack([("w", (pages * 4096,), torch.uint8)])


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), max_size=5))
def test_slots_are_disjoint_and_fill_the_buffer(shapes):
    layouts, slots = [layout(pages) for pages, _ in shapes], [count for _, count in shapes]
    arena = SlotArena(layouts, slots, HOST)
    arena.check_integrity()
    assert arena.num_bytes == sum(pages * 4096 * count for pages, count in shapes)
    arena.buffer.zero_()
    written = 0
    for number, (pages, count) in enumerate(shapes):
        rows = arena.rows(number)
        assert rows.shape == (count, pages * 4096)
        for row in rows:
            assert not row.any()
            row.fill_(1)
            written += row.numel()
    assert int(arena.buffer.sum()) == written == arena.num_bytes


def test_rows_can_be_viewed_as_tensors():
    rows_layout = ExpertLayout.pack([("w", (2, 3), torch.float32), ("b", (5,), torch.float64)])
    arena = SlotArena([layout(1), rows_layout], [1, 2], HOST)
    views = rows_layout.views(arena.rows(1))
    views["b"].fill_(1.0)
    assert views["b"].shape == (2, 5)
    assert arena.rows(1)[1, 256:296].view(torch.float64).tolist() == [1.0] * 5


@pytest.mark.parametrize("tamper", ["swap", "drop", "other"])
def test_integrity_notices(tamper):
    arena = SlotArena([layout(1), layout(2)], [2, 2], HOST)
    if tamper == "swap":
        arena._rows.reverse()
    elif tamper == "drop":
        arena._rows.pop()
    else:
        arena._rows[1] = torch.empty_like(arena._rows[1])
    with pytest.raises(AssertionError):
        arena.check_integrity()


def test_as_many_counts_as_layers():
    with pytest.raises(ValueError, match="zip"):
        SlotArena([layout(1)], [1, 2], HOST)
