"""``resolve`` and ``wave_map`` against their torch forms: equal to the last bit.

Legend: T tokens, K choices a token, E experts, S slots.
"""

from copy import deepcopy
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.kernels import resolve as module
from vllm_moe_offload.kernels.candidates import AS_LRU, FIRST, LRU
from vllm_moe_offload.kernels.dispatch import Dispatch, dispatch_torch
from vllm_moe_offload.kernels.resolve import (
    CLOSED,
    FOREVER,
    NEVER,
    NOWHERE,
    EvictionOrder,
    IdLog,
    Padding,
    ResidencyTables,
    WorkList,
    resolve,
    resolve_torch,
    wave_map,
    wave_map_torch,
)

CLOCKS = (0, 5, 2**31 - 2, 2**31, 2**40)
POISON = -77


@dataclass(frozen=True)
class Case:
    seed: int
    num_experts: int
    num_slots: int
    clock: int
    shape: tuple[int, int]
    inactive: float
    dtype: torch.dtype
    evict: bool
    ordered: bool = False


@st.composite
def cases(draw, max_tokens: int = 6) -> Case:
    num_experts = draw(st.integers(1, 40))
    return Case(
        seed=draw(st.integers(0, 2**20)),
        num_experts=num_experts,
        num_slots=draw(st.integers(0, num_experts) | st.sampled_from((0, 1, num_experts))),
        clock=draw(st.sampled_from(CLOCKS)),
        shape=(draw(st.integers(0, max_tokens)), draw(st.integers(1, 4))),
        inactive=draw(st.sampled_from((0.0, 0.3, 1.0))),
        dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        evict=True,
        ordered=draw(st.booleans()),
    )


def routed(case: Case, device: torch.device) -> torch.Tensor:
    """Draw ids with repetitions, some of them inactive in either of the ways a layer sees."""
    ids_TK = torch.randint(case.num_experts, case.shape)
    ids_TK[torch.rand(case.shape) < case.inactive] = NOWHERE
    return ids_TK.to(device, case.dtype)


def random_order(case: Case, device: torch.device) -> EvictionOrder:
    """Rows of ranks, as a view of a table that is wider than the layer."""
    experts, rows = case.num_experts, AS_LRU + 1
    wide = torch.full((rows, experts + 5), POISON, dtype=torch.int32)
    ranks = torch.randint(0, 2**20, (rows, experts)) * 1024 + torch.arange(experts)
    ranks[AS_LRU] += FIRST * torch.randint(2, (experts,))
    row = torch.tensor([LRU, 1, AS_LRU])[torch.randint(3, (1,))]
    wide[:, :experts] = ranks.int()
    return EvictionOrder(
        rank_RE=wide.to(device)[:, :experts],
        row=row.int().to(device),
        use_E=torch.full((experts,), POISON, dtype=torch.int8, device=device),
        slot_of_E=torch.full((experts,), POISON, dtype=torch.int32, device=device),
    )


def random_tables(case: Case, device: torch.device) -> ResidencyTables:
    """Fill some slots with experts, at times close together, equal and long past; close some."""
    order = random_order(case, device) if case.ordered else None
    tables = ResidencyTables.empty(case.num_experts, case.num_slots, device, order)
    count = case.num_slots if case.seed % 2 else int(torch.randint(case.num_slots + 1, ()))
    slots = torch.randperm(case.num_slots)[:count].to(device)
    experts = torch.randperm(case.num_experts)[:count].to(device)
    tables.slot_of_E[experts] = slots.int()
    tables.expert_of_S[slots] = experts.int()
    ages = torch.randint(1, 5, (count,)).to(device) * (2**33 if case.clock > 2**36 else 1)
    tables.stamp_S[slots] = (case.clock - ages).clamp(min=NEVER)
    tables.clock.fill_(case.clock)
    closed = (tables.expert_of_S == NOWHERE) & (torch.rand(case.num_slots) < 0.5).to(device)
    tables.expert_of_S[closed] = CLOSED
    tables.stamp_S[closed] = FOREVER
    return tables


def poisoned_work(num_experts: int, device: torch.device) -> WorkList:
    work = WorkList.empty(num_experts, device)
    for tensor in (work.load_expert_E, work.load_slot_E, work.stream_expert_E):
        tensor.fill_(POISON)
    return work


def assert_same(tables, work, expected_tables, expected_work) -> None:
    assert_equal(tables, expected_tables)
    assert_equal(work, expected_work)


def assert_equal(item, expected) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(item, expected, rtol=0, atol=0)
    elif expected is not None:
        for name, part in vars(expected).items():
            assert_equal(getattr(item, name), part)


def assert_same_dispatch(lists: Dispatch, expected: Dispatch) -> None:
    count = int(expected.num_blocks)
    assert int(lists.num_blocks) == count
    assert torch.equal(lists.expert_of_block[:count], expected.expert_of_block[:count])
    pairs = count * expected.block_m
    assert torch.equal(lists.sorted_pair[:pairs], expected.sorted_pair[:pairs])


def test_resolve_follows_the_order(device):
    # The newest goes first here, and the ranks fit no 16 bits.
    case = Case(1, 8, 3, 9, (1, 1), 0.0, torch.int64, True, ordered=True)
    tables = ResidencyTables.empty(8, 3, device, random_order(case, device))
    work = WorkList.empty(8, device)
    for expert in (0, 1, 2):
        resolve(torch.tensor([[expert]], device=device), tables, work, evict=True)
    tables.order.row.fill_(2)
    tables.order.rank_RE[2, :3] = torch.tensor([2**30, 2**29, 7])
    resolve(torch.tensor([[5]], device=device), tables, work, evict=True)
    assert tables.expert_of_S.tolist() == [0, 1, 5]
    assert tables.order.use_E.tolist() == [2, 2, 2, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(("row", "loads"), [(LRU, [1, 3]), (2, [3, 6]), (AS_LRU, [1, 6])])
def test_missing_experts_compete_for_slots(device, row, loads):
    case = Case(1, 8, 3, 9, (1, 1), 0.0, torch.int64, True, ordered=True)
    order = random_order(case, device)
    tables, work = ResidencyTables.empty(8, 3, device, order), WorkList.empty(8, device)
    resolve(torch.tensor([[0, 2, 4]], device=device), tables, work, evict=True)
    order.row.fill_(row)
    ranks = torch.arange(8)
    ranks[[1, 3, 6]] = torch.tensor([0, 2**29, 2**28])
    order.rank_RE[2] = ranks
    order.rank_RE[LRU] = ranks
    order.rank_RE[AS_LRU] = ranks + FIRST * (ranks == 2**28)
    resolve(torch.tensor([[6, 3, 1, 2]], device=device), tables, work, evict=True)
    assert work.load_expert_E[: work.num_loads].tolist() == loads
    assert work.stream_expert_E[: work.num_streams].tolist() == sorted({1, 3, 6} - set(loads))
    assert sorted(tables.expert_of_S.tolist()) == sorted([2, *loads])


def run_both(case: Case, device: torch.device, *, steps: int) -> None:
    """Run some steps in either form; entries past a list's length stay poisoned in both."""
    torch.manual_seed(case.seed)
    tables, work = random_tables(case, device), poisoned_work(case.num_experts, device)
    expected_tables, expected_work = deepcopy(tables), deepcopy(work)
    for _ in range(steps):
        ids_TK = routed(case, device)
        resolve(ids_TK, tables, work, evict=case.evict)
        resolve_torch(ids_TK, expected_tables, expected_work, evict=case.evict)
        assert_same(tables, work, expected_tables, expected_work)


@pytest.mark.parametrize("evict", [True, False])
@given(case=cases())
def test_resolve(case, evict, device):
    run_both(replace(case, evict=evict), device, steps=3)


@given(case=cases(max_tokens=90))
def test_resolve_counts_in_chunks(case, device):
    with mock.patch.object(module, "COUNT_CHUNK", 128):
        run_both(case, device, steps=1)


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "evict"), [(1024, 1024, True), (1024, 700, True), (999, 3, False)]
)
def test_resolve_at_its_limits(num_experts, num_slots, evict, device):
    case = Case(0, num_experts, num_slots, 2**31, (8192, 8), 0.1, torch.int32, evict)
    run_both(case, device, steps=1)
    run_both(replace(case, shape=(40, 8)), device, steps=2)


def test_resolve_orders_stamps_of_all_ages(device):
    # Ages that a 32-bit subtraction, or a key that clamps them, would confuse.
    ages = [1, 2, 2**20, 2**30, 2**30 + 1, 2**31, 2**31 + 1, 2**32, 2**39]
    case = Case(0, 40, len(ages), 2**40, (1, 4), 0.0, torch.int32, True)
    tables = ResidencyTables.empty(case.num_experts, case.num_slots, device)
    order = torch.randperm(len(ages), generator=torch.Generator().manual_seed(1))
    tables.expert_of_S.copy_(torch.arange(len(ages)))
    tables.slot_of_E[: len(ages)] = tables.expert_of_S
    tables.stamp_S.copy_(2**40 - torch.tensor(ages)[order])
    tables.clock.fill_(2**40)
    expected_tables = deepcopy(tables)
    work, expected_work = (poisoned_work(case.num_experts, device) for _ in range(2))
    for first in (20, 24, 28):
        ids_TK = torch.arange(first, first + 4, device=device)[None]
        resolve(ids_TK, tables, work, evict=True)
        resolve_torch(ids_TK, expected_tables, expected_work, evict=True)
        assert_same(tables, work, expected_tables, expected_work)


def test_resolve_without_active_ids_only_moves_the_clock(device):
    tables, work = ResidencyTables.empty(8, 4, device), WorkList.empty(8, device)
    resolve(torch.full((3, 2), NOWHERE, device=device), tables, work, evict=True)
    assert int(tables.clock) == 1
    assert not work.counters.any()
    assert bool((tables.stamp_S == NEVER).all())


@given(case=cases(), block_m=st.sampled_from((1, 4, 16)))
def test_resolve_also_sorts_pairs(case, block_m, device):
    torch.manual_seed(case.seed)
    tables, work = random_tables(case, device), WorkList.empty(case.num_experts, device)
    ids_TK = routed(case, device)
    lists, expected = (
        Dispatch.empty(ids_TK.numel(), case.num_experts, block_m, device) for _ in range(2)
    )
    resolve(ids_TK, tables, work, evict=case.evict, dispatch=lists)
    dispatch_torch(ids_TK, expected)
    assert_same_dispatch(lists, expected)


@given(case=cases(), parts=st.integers(1, 4))
def test_resolve_also_tells_who_comes_when(case, parts, device):
    torch.manual_seed(case.seed)
    tables, work = random_tables(case, device), poisoned_work(case.num_experts, device)
    expected_tables, expected_work = deepcopy(tables), deepcopy(work)
    shape = (1 + parts, case.num_experts)
    got, expected = (torch.full(shape, POISON, dtype=torch.int32, device=device) for _ in range(2))
    for _ in range(2):
        ids_TK, before = routed(case, device), tables.slot_of_E.clone()
        resolve(ids_TK, tables, work, evict=case.evict, slot_of_AE=got)
        resolve_torch(ids_TK, expected_tables, expected_work, evict=case.evict, slot_of_AE=expected)
        assert_same(tables, work, expected_tables, expected_work)
        assert torch.equal(got, expected)
    # Every active expert that has a slot comes once, those that were there before at once.
    active = ids_TK[ids_TK >= 0].long().unique()
    rows = (got >= 0).sum(0)
    assert torch.equal(rows[active], (tables.slot_of_E[active] >= 0).long())
    assert int(rows.sum()) == int(rows[active].sum())
    assert torch.equal(got.amax(0)[active], tables.slot_of_E[active])
    assert torch.equal(got[0, active], before[active])
    # What a part brings is in its slots when that part of the list has been moved.
    for part in range(parts):
        first, stop = (int(work.num_loads) * n // parts for n in (part, part + 1))
        moved = work.load_expert_E[first:stop].long()
        assert torch.equal(got[part + 1, moved], work.load_slot_E[first:stop])
        assert int((got[part + 1] >= 0).sum()) == stop - first


@pytest.mark.parametrize("fused_pairs", [0, 1024])
def test_resolve_sorts_pairs_in_either_way(fused_pairs, device):
    case = Case(3, 33, 7, 9, (100, 3), 0.2, torch.int64, True)
    torch.manual_seed(case.seed)
    tables, work = random_tables(case, device), WorkList.empty(case.num_experts, device)
    expected_tables, expected_work = deepcopy(tables), deepcopy(work)
    ids_TK = routed(case, device)
    lists, expected = (
        Dispatch.empty(ids_TK.numel(), case.num_experts, 16, device) for _ in range(2)
    )
    with (
        mock.patch.object(module, "FUSED_PAIRS", fused_pairs),
        mock.patch.object(module, "RANK_CHUNK", 32),
    ):
        resolve(ids_TK, tables, work, evict=True, dispatch=lists)
    resolve_torch(ids_TK, expected_tables, expected_work, evict=True, dispatch=expected)
    assert_same_dispatch(lists, expected)
    assert int(work.counters[0]) == int(expected_work.counters[0])


@pytest.mark.parametrize("room", [40, 3, 0], ids=["room", "little", "none"])
@given(case=cases())
def test_resolve_also_logs_ids(case, room, device):
    torch.manual_seed(case.seed)
    tables, work = random_tables(case, device), poisoned_work(case.num_experts, device)
    expected_tables, expected_work = deepcopy(tables), deepcopy(work)
    ids_TK = routed(case, device)
    # What the router chose is more than what this worker holds.
    chosen_TK = torch.where(ids_TK < 0, 30_000, ids_TK + 7)
    log_TK = torch.full((room, case.shape[1]), POISON, dtype=torch.int16, device=device)
    expected_TK = log_TK.clone()
    resolve(ids_TK, tables, work, evict=case.evict, log=IdLog(chosen_TK, log_TK))
    resolve_torch(ids_TK, expected_tables, expected_work, evict=case.evict,
                  log=IdLog(chosen_TK, expected_TK))  # fmt: skip
    assert_same(tables, work, expected_tables, expected_work)
    assert torch.equal(log_TK, expected_TK)
    kept = min(room, case.shape[0])
    assert torch.equal(log_TK[:kept], chosen_TK[:kept].short())
    assert bool((log_TK[kept:] == POISON).all())


def test_resolve_logs_ids_in_chunks(device):
    case = Case(0, 64, 8, 0, (90, 4), 0.1, torch.int64, True)
    torch.manual_seed(0)
    tables, work = random_tables(case, device), WorkList.empty(64, device)
    ids_TK = routed(case, device)
    log_TK = torch.full((100, 4), POISON, dtype=torch.int16, device=device)
    with mock.patch.object(module, "COUNT_CHUNK", 128):
        resolve(ids_TK, tables, work, evict=True, log=IdLog(ids_TK, log_TK))
    assert torch.equal(log_TK[:90], ids_TK.short())
    assert bool((log_TK[90:] == POISON).all())


@pytest.mark.parametrize("chunk", [128, 2048])
@given(case=cases(max_tokens=60), share=st.sampled_from((0.0, 0.4, 1.0)))
def test_resolve_leaves_out_padding(case, share, chunk, device):
    torch.manual_seed(case.seed)
    tables, work = random_tables(case, device), poisoned_work(case.num_experts, device)
    expected_tables, expected_work = deepcopy(tables), deepcopy(work)
    plain_tables, plain_work = deepcopy(tables), deepcopy(work)
    ids_TK = routed(case, device)
    is_padding_T = (torch.rand(case.shape[0]) < share).to(device)
    lists, expected_lists = (
        Dispatch.empty(ids_TK.numel(), case.num_experts, 16, device) for _ in range(2)
    )
    padding, expected = (Padding(is_padding_T, torch.full_like(ids_TK, POISON)) for _ in range(2))
    with mock.patch.object(module, "COUNT_CHUNK", chunk):
        resolve(ids_TK, tables, work, evict=case.evict, dispatch=lists, padding=padding)
    resolve_torch(ids_TK, expected_tables, expected_work, evict=case.evict,
                  dispatch=expected_lists, padding=expected)  # fmt: skip
    assert_same(tables, work, expected_tables, expected_work)
    assert_same_dispatch(lists, expected_lists)
    # As if the rows had chosen nothing.
    left_TK = ids_TK.masked_fill(is_padding_T.unsqueeze(1), NOWHERE)
    assert torch.equal(padding.active_TK, left_TK)
    resolve(left_TK, plain_tables, plain_work, evict=case.evict)
    assert_same(tables, work, plain_tables, plain_work)


@given(
    num_experts=st.integers(1, 40),
    streams=st.integers(0, 40),
    first=st.integers(0, 40),
    rows=st.integers(1, 40),
)
def test_wave_map(num_experts, streams, first, rows, device):
    streams = min(streams, num_experts)
    work = poisoned_work(num_experts, device)
    experts = torch.randperm(num_experts)[:streams].sort().values
    work.stream_expert_E[:streams] = experts.int().to(device)
    work.num_streams.fill_(streams)
    row_of_E = torch.full((num_experts,), POISON, dtype=torch.int32, device=device)
    expected = row_of_E.clone()
    wave_map(work, first, row_of_E, rows=rows)
    wave_map_torch(work, first, expected, rows=rows)
    assert torch.equal(row_of_E, expected)
