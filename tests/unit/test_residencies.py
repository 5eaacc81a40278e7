"""Slots that open and close in all layers while experts come and go."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_moe_offload.eviction import AdaptiveEviction
from vllm_moe_offload.kernels.operations import TORCH
from vllm_moe_offload.kernels.resolve import resolve_torch
from vllm_moe_offload.residencies import Residencies

HOST = torch.device("cpu")
EXPERTS, SLOTS = (9, 12, 7), 6

ids = st.lists(st.integers(-1, min(EXPERTS) - 1), min_size=1, max_size=6)
step = st.tuples(st.integers(0, len(EXPERTS) - 1), ids)


def make(policy: str = "lru") -> Residencies:
    slots = [SLOTS] * len(EXPERTS)
    eviction = AdaptiveEviction(EXPERTS, slots, HOST, TORCH) if policy == "adaptive" else None
    return Residencies(EXPERTS, slots, HOST, eviction)


def resolve(residencies: Residencies, layer: int, ids: list[int], *, evict: bool = True) -> None:
    residency = residencies[layer]
    resolve_torch(torch.tensor([ids]), residency.tables, residency.work, evict=evict)


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
@given(events=st.lists(step | st.integers(0, SLOTS), max_size=25), evict=st.booleans())
def test_closed_slots_hold_nobody(policy, events, evict):
    residencies = make(policy)
    for event in events:
        before = [residency.tables.slot_of_E.tolist() for residency in residencies]
        if isinstance(event, tuple):
            resolve(residencies, *event, evict=evict)
        else:
            residencies.open_from(event)
            kept = [[slot if slot >= event else -1 for slot in layer] for layer in before]
            assert [residency.tables.slot_of_E.tolist() for residency in residencies] == kept
        residencies.check_integrity()
        for residency in residencies:
            slots = residency.tables.slot_of_E
            assert bool(((slots == -1) | (slots >= residency.first_open)).all())
            assert residency.num_resident() == int((slots >= 0).sum())


def test_opened_slots_are_the_first_to_be_filled():
    residencies = make()
    residencies.open_from(4)
    for expert in (0, 1, 2):
        resolve(residencies, 1, [expert])
    residencies.open_from(2)
    for expert in (3, 4):
        resolve(residencies, 1, [expert])
    expert_of_S = residencies[1].tables.expert_of_S
    assert set(expert_of_S[2:].tolist()) == {1, 2, 3, 4}
    resolve(residencies, 1, [5])
    assert set(expert_of_S[2:].tolist()) == {2, 3, 4, 5}


def test_all_slots_are_open_at_first():
    residencies = make()
    assert [residency.first_open for residency in residencies] == [0, 0, 0]
    residencies.check_integrity()


def test_layers_share_no_entry():
    residencies = make("adaptive")
    for layer, residency in enumerate(residencies):
        residency.fill(torch.arange(layer + 1, dtype=torch.int32))
    assert [residency.num_resident() for residency in residencies] == [1, 2, 3]
    residencies.check_integrity()
    residencies.empty()
    assert [residency.num_resident() for residency in residencies] == [0, 0, 0]


@pytest.mark.parametrize("slots", [[5, 3], [0, 0]])
def test_tables_begin_where_kernels_read_fast(slots):
    residencies = Residencies([7, 9], slots, HOST)
    for residency, count in zip(residencies, slots, strict=True):
        assert residency.num_slots == count
        tables = residency.tables
        for table in (tables.slot_of_E, tables.expert_of_S, tables.stamp_S, tables.clock):
            assert table.data_ptr() % 16 == 0


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("policy", ["lru", "adaptive"])
def test_a_move_takes_as_many_launches_for_many_layers_as_for_one(policy):
    def launches(layers: int, first: int) -> list[str]:
        experts, slots = [16] * layers, [8] * layers
        eviction = AdaptiveEviction(experts, slots, HOST, TORCH) if policy == "adaptive" else None
        residencies = Residencies(experts, slots, HOST, eviction)
        residencies.open_from(4)
        with Launches() as counted:
            residencies.open_from(first)
        return counted.names

    for first in (2, 7):
        assert launches(48, first) == launches(1, first)
        assert 0 < len(launches(48, first)) <= 5


def test_a_policy_that_counts_on_other_slots_is_found_out():
    residencies = make("adaptive")
    residencies._open_L[2] = 1
    with pytest.raises(AssertionError, match="other slots"):
        residencies.check_integrity()
