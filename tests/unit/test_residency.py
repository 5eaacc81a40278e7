"""Slots that open and close while experts come and go."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.kernels.resolve import resolve_torch
from vllm_moe_offload.residency import Residency

HOST = torch.device("cpu")
EXPERTS, SLOTS = 9, 6

ids = st.lists(st.integers(-1, EXPERTS - 1), min_size=1, max_size=6)


@given(st.lists(ids.map(lambda i: ("step", i)) | st.integers(0, SLOTS).map(lambda s: ("open", s)),
                max_size=25), st.booleans())  # fmt: skip
def test_closed_slots_hold_nobody(events, evict):
    residency = Residency(EXPERTS, SLOTS, HOST)
    for what, value in events:
        before = residency.tables.slot_of_E.tolist()
        if what == "step":
            ids_TK = torch.tensor([value])
            resolve_torch(ids_TK, residency.tables, residency.work, evict=evict)
        else:
            residency.open_from(value)
            kept = [slot if slot >= value else -1 for slot in before]
            assert residency.tables.slot_of_E.tolist() == kept
        residency.check_integrity()
        slots = residency.tables.slot_of_E
        assert bool(((slots == -1) | (slots >= residency.first_open)).all())
        assert residency.num_resident() == int((slots >= 0).sum())


def test_opened_slots_are_the_first_to_be_filled():
    residency = Residency(EXPERTS, SLOTS, HOST)
    residency.open_from(4)
    for expert in (0, 1, 2):
        resolve_torch(torch.tensor([[expert]]), residency.tables, residency.work, evict=True)
    residency.open_from(2)
    for expert in (3, 4):
        resolve_torch(torch.tensor([[expert]]), residency.tables, residency.work, evict=True)
    assert set(residency.tables.expert_of_S[2:].tolist()) == {1, 2, 3, 4}
    resolve_torch(torch.tensor([[5]]), residency.tables, residency.work, evict=True)
    assert set(residency.tables.expert_of_S[2:].tolist()) == {2, 3, 4, 5}


def test_all_slots_are_open_at_first():
    residency = Residency(EXPERTS, SLOTS, HOST)
    assert residency.first_open == 0
    residency.check_integrity()
