"""``tally`` against its torch form.

Legend: T tokens, K choices a token, E experts, M pairs of a block.
"""

from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.kernels import tally as module
from vllm_moe_offload.kernels.dispatch import Dispatch, dispatch
from vllm_moe_offload.kernels.resolve import NOWHERE, Counter
from vllm_moe_offload.kernels.tally import tally, tally_torch


@given(
    tokens=st.integers(0, 150),
    choices=st.integers(1, 4),
    num_experts=st.integers(1, 40),
    inactive=st.sampled_from((0.0, 0.3, 1.0)),
    block_m=st.sampled_from((1, 4, 16)),
    moved=st.integers(0, 50),
    seed=st.integers(0, 2**20),
)
def test_tally(tokens, choices, num_experts, inactive, block_m, moved, seed, device):
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(num_experts, (tokens, choices), generator=generator, dtype=torch.int32)
    ids_TK[torch.rand(ids_TK.shape, generator=generator) < inactive] = NOWHERE
    slot_of_E = torch.arange(num_experts, dtype=torch.int32)
    slot_of_E[torch.rand(num_experts, generator=generator) < 0.5] = NOWHERE
    counters = torch.randint(1 << 40, (len(Counter),), generator=generator)
    ids_TK, slot_of_E, counters = (t.to(device) for t in (ids_TK, slot_of_E, counters))
    expected = counters.clone()
    lists = Dispatch.empty(ids_TK.numel(), num_experts, block_m, device)
    lists.expert_of_block.fill_(num_experts + 10**6)  # past the last block nobody may look
    dispatch(ids_TK, lists)
    with mock.patch.object(module, "BLOCKS_AT_ONCE", 16):
        tally(ids_TK, slot_of_E, counters, moved, dispatch=lists)
    tally_torch(ids_TK, slot_of_E, expected, moved)
    assert torch.equal(counters, expected)


def test_what_is_counted(device):
    ids_TK = torch.tensor([[0, 3], [3, -1], [4, 0]], dtype=torch.int32, device=device)
    slot_of_E = torch.tensor([7, 1, NOWHERE, NOWHERE, 2, NOWHERE], dtype=torch.int32, device=device)
    counters = torch.zeros(len(Counter), dtype=torch.int64, device=device)
    lists = Dispatch.empty(6, 6, 4, device)
    dispatch(ids_TK, lists)
    tally(ids_TK, slot_of_E, counters, 3, dispatch=lists)
    counted = {Counter.ACTIVE: 3, Counter.HITS: 2, Counter.STREAMS: 1, Counter.SURPLUS: 2}
    assert counters.tolist() == [counted.get(counter, 0) for counter in Counter]
