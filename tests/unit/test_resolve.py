"""The torch form of resolve against a model in plain Python, written from its docstring."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload.kernels.resolve import Counter, ResidencyTables, resolve_torch
from vllm_moe_offload.residency import Residency

HOST = torch.device("cpu")


class LruModel:
    """One layer's slots: who sits where and when each was last read."""

    def __init__(self, num_experts: int, num_slots: int) -> None:
        self.num_experts = num_experts
        self.expert_in = dict.fromkeys(range(num_slots))
        self.last_read = dict.fromkeys(range(num_slots), -1)
        self.now = 0
        self.counts = {counter.name.lower(): 0 for counter in Counter}

    def slot_of(self, expert: int) -> int | None:
        return next((s for s, held in self.expert_in.items() if held == expert), None)

    def step(self, ids: list[int], *, evict: bool) -> tuple[list[tuple[int, int]], list[int]]:
        """Return loads as (expert, slot), and streams."""
        active = sorted({expert for expert in ids if expert >= 0})
        hits = [expert for expert in active if self.slot_of(expert) is not None]
        for expert in hits:
            self.last_read[self.slot_of(expert)] = self.now
        victims = sorted(
            (last, -1 if self.expert_in[slot] is None else self.expert_in[slot], slot)
            for slot, last in self.last_read.items()
            if self.expert_in[slot] is None or (evict and last < self.now)
        )
        loads, streams = [], []
        for expert in active:
            if expert in hits:
                continue
            if victims:
                *_, slot = victims.pop(0)
                self.expert_in[slot], self.last_read[slot] = expert, self.now
                loads.append((expert, slot))
            else:
                streams.append(expert)
        self.now += 1
        for name, found in zip(self.counts, (active, hits, loads, streams), strict=False):
            self.counts[name] += len(found)
        return loads, streams


@st.composite
def sequences(draw):
    num_experts = draw(st.integers(1, 9))
    num_slots = draw(st.integers(0, num_experts))
    choices = draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=choices, max_size=choices)
    step = st.tuples(st.lists(row, max_size=5), st.booleans())
    steps = draw(st.lists(step, min_size=1, max_size=12))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return num_experts, num_slots, choices, dtype, steps


def resolve(residency: Residency, ids_TK: torch.Tensor, *, evict: bool) -> None:
    resolve_torch(ids_TK, residency.tables, residency.work, evict=evict)


def ids_of(rows, choices: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype).view(-1, choices)


def work_of(residency: Residency) -> tuple[list[tuple[int, int]], list[int]]:
    work = residency.work
    num_loads, num_streams = int(work.num_loads), int(work.num_streams)
    experts, slots = (w[:num_loads].tolist() for w in (work.load_expert_E, work.load_slot_E))
    return list(zip(experts, slots, strict=True)), work.stream_expert_E[:num_streams].tolist()


@settings(max_examples=200)
@given(sequences())
def test_against_the_model(sequence):
    num_experts, num_slots, choices, dtype, steps = sequence
    residency, model = (
        Residency(ResidencyTables.empty(num_experts, num_slots, HOST)),
        LruModel(num_experts, num_slots),
    )
    for rows, evict in steps:
        # What is left of the step before must not matter.
        for name in ("load_expert_E", "load_slot_E", "stream_expert_E"):
            getattr(residency.work, name).fill_(-99)
        resolve(residency, ids_of(rows, choices, dtype), evict=evict)
        expected = model.step([expert for row in rows for expert in row], evict=evict)
        assert work_of(residency) == expected

        tables = residency.tables
        held = [-1 if e is None else e for e in model.expert_in.values()]
        assert tables.expert_of_S.tolist() == held
        assert tables.stamp_S.tolist() == list(model.last_read.values())
        slots = [model.slot_of(expert) for expert in range(num_experts)]
        assert tables.slot_of_E.tolist() == [-1 if slot is None else slot for slot in slots]
        assert int(tables.clock) == model.now
        assert residency.counts() == model.counts
        residency.check_integrity()


@given(sequences())
def test_counters_and_capacity(sequence):
    num_experts, num_slots, choices, dtype, steps = sequence
    residency = Residency(ResidencyTables.empty(num_experts, num_slots, HOST))
    for rows, evict in steps:
        before = residency.counts()
        resolve(residency, ids_of(rows, choices, dtype), evict=evict)
        step = {name: count - before[name] for name, count in residency.counts().items()}
        distinct = {expert for row in rows for expert in row if expert >= 0}
        assert step["active"] == len(distinct)
        assert step["hits"] + step["loads"] + step["streams"] == step["active"]
        assert residency.num_resident() <= num_slots
        if evict:
            assert step["streams"] == max(0, len(distinct) - num_slots)
        resident = set(residency.tables.expert_of_S.tolist()) - {-1}
        streamed = set(work_of(residency)[1])
        assert distinct - streamed <= resident
        assert not streamed & resident


@given(sequences())
def test_a_sweep_evicts_nobody(sequence):
    num_experts, num_slots, choices, dtype, steps = sequence
    residency = Residency(ResidencyTables.empty(num_experts, num_slots, HOST))
    for rows, evict in steps:
        before = residency.tables.expert_of_S.clone()
        resolve(residency, ids_of(rows, choices, dtype), evict=evict)
        if not evict:
            occupied = before >= 0
            after = residency.tables.expert_of_S
            assert torch.equal(after[occupied], before[occupied])


@given(sequences(), st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(sequence, random):
    num_experts, num_slots, _, dtype, steps = sequence
    one, other = (Residency(ResidencyTables.empty(num_experts, num_slots, HOST)) for _ in range(2))
    for rows, evict in steps:
        ids = [expert for row in rows for expert in row]
        shuffled = [*ids, -1, *ids]
        random.shuffle(shuffled)
        resolve(one, ids_of(ids, 1, dtype), evict=evict)
        resolve(other, ids_of(shuffled, 1, dtype), evict=evict)
        assert work_of(one) == work_of(other)
        assert torch.equal(one.tables.expert_of_S, other.tables.expert_of_S)


@pytest.mark.parametrize("ids", [[[-1, -1]], []], ids=["inactive", "no tokens"])
@pytest.mark.parametrize("evict", [True, False])
def test_inactive_ids_cost_nothing(ids, evict):
    residency = Residency(ResidencyTables.empty(4, 2, HOST))
    resolve(residency, torch.tensor([[0, 3]]), evict=True)
    held, counts = residency.tables.expert_of_S.clone(), residency.counts()
    resolve(residency, ids_of(ids, 2, torch.int64), evict=evict)
    assert work_of(residency) == ([], [])
    assert residency.counts() == counts
    assert torch.equal(residency.tables.expert_of_S, held)


def test_known_sequence():
    residency = Residency(ResidencyTables.empty(5, 2, HOST))

    def step(*ids: int, evict: bool = True):
        resolve(residency, torch.tensor([ids]), evict=evict)
        return work_of(residency)

    assert step(3) == ([(3, 0)], [])
    assert step(1) == ([(1, 1)], [])
    assert step(3) == ([], [])
    assert step(4) == ([(4, 1)], [])  # 1 was read longest ago
    assert step(0, 2, 3) == ([(0, 1)], [2])  # 3 is read in this step and stays
    assert step(4, evict=False) == ([], [4])


def spoil(residency: Residency, kind: str) -> None:
    tables = residency.tables
    if kind == "two experts in a slot":
        tables.slot_of_E[1] = tables.slot_of_E[0]
    elif kind == "two slots of an expert":
        tables.expert_of_S[1] = tables.expert_of_S[0]
    elif kind == "swapped":
        tables.slot_of_E[:2] = tables.slot_of_E[:2].flip(0)
    elif kind == "future":
        tables.stamp_S[0] = tables.clock
    else:
        residency.work.counters[0] += 1


@pytest.mark.parametrize(
    "kind", ["two experts in a slot", "two slots of an expert", "swapped", "future", "counter"]
)
def test_integrity_notices(kind):
    residency = Residency(ResidencyTables.empty(4, 3, HOST))
    resolve(residency, torch.tensor([[0, 1, 2]]), evict=True)
    residency.check_integrity()
    spoil(residency, kind)
    with pytest.raises(AssertionError):
        residency.check_integrity()
