"""``gather`` against its torch form: named rows arrive whole, all others stay as they were."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.kernels import gather as module
from vllm_moe_offload.kernels.gather import gather, gather_torch

PAGE = 4096


def random_rows(rows: int, row_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.randint(256, (rows, row_bytes), dtype=torch.uint8).to(device)


def int32(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@given(
    pages=st.integers(1, 4),
    num_source=st.integers(1, 6),
    num_target=st.integers(1, 6),
    length=st.integers(0, 8),
    first=st.integers(0, 4),
    limit=st.none() | st.integers(0, 4),
    parts=st.integers(1, 3),
    programs=st.sampled_from((1, 3, 8)),
    mapped=st.booleans(),
    piece_words=st.sampled_from((256, 1024, 2048)),
    data=st.data(),
)
def test_gather(
    pages, num_source, num_target, length, first, limit, parts, programs, mapped, piece_words, data,
    device,
):  # fmt: skip
    entries = num_target
    source = random_rows(num_source, pages * PAGE, device)
    row = st.lists(st.integers(0, num_source - 1), min_size=entries, max_size=entries)
    source_row_N = int32(data.draw(row), device)
    target_row_N = int32(data.draw(st.permutations(range(entries))), device) if mapped else None
    arguments = (source_row_N, target_row_N, int32([length], device))
    # Rows lie apart, as in a buffer of several layers.
    block = torch.full((num_target, (pages + 1) * PAGE), 0xAB, dtype=torch.uint8, device=device)
    expected = block.clone()
    part = data.draw(st.integers(0, parts - 1))
    of_list = {"first": first, "limit": limit, "part": part, "parts": parts}
    with mock.patch.object(module, "PIECE_WORDS", piece_words):
        gather(source, block[:, : pages * PAGE], *arguments, **of_list, programs=programs)
    gather_torch(source, expected[:, : pages * PAGE], *arguments, **of_list)
    assert torch.equal(block, expected)


@pytest.mark.parametrize("length", range(8))
def test_the_parts_are_the_whole(length, device):
    source = random_rows(7, PAGE, device)
    rows, number = int32([3, 1, 4, 0, 6, 2, 5], device), int32([length], device)
    whole, of_parts = (torch.zeros(7, PAGE, dtype=torch.uint8, device=device) for _ in range(2))
    gather(source, whole, rows, rows, number)
    for part in range(3):
        gather(source, of_parts, rows, rows, number, part=part, parts=3)
    assert torch.equal(of_parts, whole)
    assert torch.equal(whole[rows[:length].long()], source[rows[:length].long()])


def test_gather_reaches_beyond_two_gigabytes(device):
    # Pages that nothing touches take no memory on the host.
    row_bytes = 1 << 20
    source = torch.empty(3 << 10, row_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros(2, row_bytes, dtype=torch.uint8, device=device)
    rows = [3000, 2049]
    for value, row in enumerate(rows, start=1):
        source[row] = value
    gather(source, target, int32(rows, device), int32([1, 0], device), int32([2], device))
    assert bool((target[1] == 1).all())
    assert bool((target[0] == 2).all())


def test_gather_into_no_rows(device):
    source = random_rows(2, PAGE, device)
    target = torch.empty(0, PAGE, dtype=torch.uint8, device=device)
    gather(source, target, int32([0, 0], device), int32([0, 0], device), int32([0], device))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="mapped host memory needs a GPU")
def test_gather_from_mapped_host_memory(device):
    # Pinned memory has the same address on the device; Triton takes pointers by that check.
    source = random_rows(5, 9 * PAGE, torch.device("cpu")).pin_memory()
    target = torch.zeros(5, 9 * PAGE, dtype=torch.uint8, device=device)
    order = [4, 2, 0]
    gather(source, target, int32(order, device), None, int32([3], device))
    assert torch.equal(target[:3].cpu(), source[order])
