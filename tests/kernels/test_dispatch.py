"""``dispatch`` against its torch form, and the torch form against what it promises.

Legend: T tokens, K choices a token, E experts, M pairs of a block.
"""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.kernels import dispatch as module
from vllm_moe_offload.kernels.dispatch import Dispatch, dispatch, dispatch_torch, max_blocks


def routed(shape, num_experts, inactive, dtype, seed) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(num_experts, shape, generator=generator)
    ids_TK[torch.rand(shape, generator=generator) < inactive] = -1
    return ids_TK.to(dtype)


def assert_same(lists: Dispatch, expected: Dispatch) -> None:
    count = int(expected.num_blocks)
    pairs = count * expected.block_m
    assert int(lists.num_blocks) == count
    assert torch.equal(lists.expert_of_block[:count], expected.expert_of_block[:count])
    assert torch.equal(lists.sorted_pair[:pairs], expected.sorted_pair[:pairs])


drawn = {
    "tokens": st.integers(0, 150),
    "choices": st.integers(1, 4),
    "num_experts": st.integers(1, 40),
    "inactive": st.sampled_from((0.0, 0.3, 1.0)),
    "block_m": st.sampled_from((1, 4, 16)),
    "dtype": st.sampled_from((torch.int32, torch.int64)),
    "seed": st.integers(0, 2**20),
}


@given(**drawn)
def test_dispatch(tokens, choices, num_experts, inactive, block_m, dtype, seed, device):
    ids_TK = routed((tokens, choices), num_experts, inactive, dtype, seed).to(device)
    with (
        mock.patch.object(module, "PAIRS_PER_PROGRAM", 128),
        mock.patch.object(module, "RANK_CHUNK", 32),
        mock.patch.object(module, "COUNTS_AT_ONCE", 128),
    ):
        lists = Dispatch.empty(ids_TK.numel(), num_experts, block_m, device)
        expected = Dispatch.empty(ids_TK.numel(), num_experts, block_m, device)
        dispatch(ids_TK, lists)
    dispatch_torch(ids_TK, expected)
    assert_same(lists, expected)


@pytest.mark.parametrize(("num_experts", "block_m"), [(1024, 16), (8, 128)])
def test_dispatch_of_a_prefill(num_experts, block_m, device):
    ids_TK = routed((1000, 8), num_experts, 0.1, torch.int32, seed=0).to(device)
    lists = Dispatch.empty(ids_TK.numel(), num_experts, block_m, device)
    expected = Dispatch.empty(ids_TK.numel(), num_experts, block_m, device)
    dispatch(ids_TK, lists)
    dispatch_torch(ids_TK, expected)
    assert_same(lists, expected)


@given(**drawn)
def test_the_torch_form_sorts(tokens, choices, num_experts, inactive, block_m, dtype, seed, device):
    ids_TK = routed((tokens, choices), num_experts, inactive, dtype, seed)
    lists = Dispatch.empty(ids_TK.numel(), num_experts, block_m, ids_TK.device)
    dispatch_torch(ids_TK, lists)
    ids = ids_TK.reshape(-1)
    seen = []
    for block in range(int(lists.num_blocks)):
        pairs = lists.sorted_pair[block * block_m : (block + 1) * block_m]
        real = pairs[pairs < ids.numel()].long()
        assert bool((ids[real] == lists.expert_of_block[block]).all())
        assert torch.equal(pairs[: real.numel()].long(), real), "padding stands before a pair"
        assert bool((pairs[real.numel() :] == ids.numel()).all())
        assert real.numel() > 0
        seen += real.tolist()
    assert sorted(seen) == torch.nonzero(ids >= 0).flatten().tolist()


@pytest.mark.parametrize(
    ("counts", "block_m"), [([1, 1, 1], 4), ([4, 0, 0], 4), ([5, 5, 5], 4), ([9, 1, 1], 4)]
)
def test_buffers_hold_every_routing(counts, block_m):
    needed = sum(-(-count // block_m) for count in counts)
    assert needed <= max_blocks(sum(counts), len(counts), block_m)


def test_buffers_are_no_larger_than_the_worst_routing_needs():
    # Nine pairs of three experts: 7, 1 and 1.
    assert max_blocks(9, 3, 4) == 2 + 1 + 1
