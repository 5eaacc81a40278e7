from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.layout import ROW_ALIGNMENT, TENSOR_ALIGNMENT, ExpertLayout

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.uint8, torch.int8, torch.int32, torch.int64,
]  # fmt: skip

shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
tensors = st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6).map(
    lambda specs: [(f"t{i}", shape, dtype) for i, (shape, dtype) in enumerate(specs)]
)


@given(tensors)
def test_alignment(tensors):
    layout = ExpertLayout.pack(tensors)
    assert [(t.name, t.shape, t.dtype) for t in layout.tensors] == tensors
    assert all(t.offset % TENSOR_ALIGNMENT == 0 for t in layout.tensors)
    for before, after in pairwise(layout.tensors):
        assert before.offset + before.num_bytes <= after.offset
    last = layout.tensors[-1]
    assert layout.row_bytes % ROW_ALIGNMENT == 0
    assert 0 <= layout.row_bytes - (last.offset + last.num_bytes) < ROW_ALIGNMENT
    assert layout.num_bytes == sum(t.num_bytes for t in layout.tensors)


@given(tensors, st.integers(0, 4), st.integers(0, 3))
def test_views_share_the_memory_of_the_rows(tensors, num_rows, rows_before):
    layout = ExpertLayout.pack(tensors)
    buffer = torch.full(((rows_before + num_rows) * layout.row_bytes,), 0xA5, dtype=torch.uint8)
    rows = buffer[rows_before * layout.row_bytes :].view(num_rows, layout.row_bytes)
    expected = buffer.clone()
    views = layout.views(rows)
    assert list(views) == [name for name, *_ in tensors]
    for spec in layout.tensors:
        view = views[spec.name]
        assert view.shape == (num_rows, *spec.shape)
        assert view.dtype == spec.dtype
        content = torch.randint(0, 256, (num_rows, spec.num_bytes), dtype=torch.uint8)
        view.copy_(content.view(spec.dtype).view(view.shape))
        for row in range(num_rows):
            start = (rows_before + row) * layout.row_bytes + spec.offset
            expected[start : start + spec.num_bytes] = content[row]
    assert torch.equal(buffer, expected)


def test_every_row_of_a_view_is_contiguous():
    layout = ExpertLayout.pack(
        [("w", (3, 5), torch.bfloat16), ("scale", (3,), torch.float32), ("v", (4, 2), torch.uint8)]
    )
    rows = torch.zeros(2, layout.row_bytes, dtype=torch.uint8)
    assert all(view[1].is_contiguous() for view in layout.views(rows).values())


def test_rows_apart():
    layout = ExpertLayout.pack([("w", (3, 5), torch.bfloat16), ("scale", (2,), torch.float32)])
    buffer = torch.arange(5 * 4096 * 3, dtype=torch.int32).view(torch.uint8)[4096:]
    apart = buffer.as_strided((4, 4096), (3 * 4096, 1), buffer.storage_offset() + 4096)
    close = apart.contiguous()
    for name, view in layout.views(apart).items():
        assert torch.equal(view.view(torch.uint8), layout.views(close)[name].view(torch.uint8))
        assert view.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()


def test_known_offsets():
    layout = ExpertLayout.pack(
        [("w13", (64, 32), torch.bfloat16), ("b", (3,), torch.float32), ("w2", (1,), torch.int8)]
    )
    assert [t.offset for t in layout.tensors] == [0, 4096, 4352]
    assert layout.row_bytes == 8192
    assert layout.num_bytes == 4096 + 12 + 1


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(2, 4096, dtype=torch.int8),
        torch.zeros(2, 8192, dtype=torch.uint8),
        torch.zeros(4096, 2, dtype=torch.uint8).T,
        torch.zeros(2, 4097, dtype=torch.uint8)[:, :4096],
    ],
    ids=["dtype", "width", "bytes apart", "rows askew"],
)
def test_rows_of_another_kind(rows):
    layout = ExpertLayout.pack([("w", (8,), torch.float32)])
    with pytest.raises(AssertionError):
        layout.views(rows)
