"""The adaptive policy as the engine runs it, in torch: against the simulator, and by itself.

Legend: L layers, T tokens of a step, K choices a token, E experts.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import random_trace, recorded, trace_of

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.eviction import AdaptiveEviction
from vllm_moe_offload.kernels.candidates import CANDIDATES, HIT, LRU, SEQUEL, SOON
from vllm_moe_offload.kernels.learn import AS_LRU, Standing
from vllm_moe_offload.kernels.operations import TORCH
from vllm_moe_offload.kernels.resolve import CLOSED, NOWHERE, resolve_torch
from vllm_moe_offload.residencies import Residencies
from vllm_moe_offload.simulate.replay import replay, slots_of
from vllm_moe_offload.simulate.steps import iterate, schedule
from vllm_moe_offload.trace import load

HOST = torch.device("cpu")


class Layers:
    """Residency of some layers under the policy, without weights."""

    def __init__(self, experts: list[int], slots: list[int], policy: str = "adaptive") -> None:
        self.eviction = (
            AdaptiveEviction(experts, slots, HOST, TORCH) if policy == "adaptive" else None
        )
        self.residency = Residencies(experts, slots, HOST, self.eviction)

    def step(self, ids_LTK, *, evict: bool = True) -> None:
        for residency, ids_TK in zip(self.residency, ids_LTK, strict=True):
            resolve_torch(torch.as_tensor(ids_TK), residency.tables, residency.work, evict=evict)
        if self.eviction and evict:
            self.eviction.learn()

    def resident(self, layer: int = 0) -> set[int]:
        return set(self.residency[layer].tables.expert_of_S.tolist()) - {NOWHERE, CLOSED}

    def count(self, name: str) -> int:
        return sum(residency.counts()[name] for residency in self.residency)

    def check_integrity(self) -> None:
        self.residency.check_integrity()
        if self.eviction:
            self.eviction.check_integrity()

    @property
    def balance(self) -> int:
        return int(self.eviction.tables.standing[Standing.BALANCE])

    @property
    def leader(self) -> int:
        return int(self.eviction.tables.standing[Standing.LEADER])


def hits_of_the_engine(trace, cache: float, batch: int) -> int:
    slots = slots_of(trace, cache)
    layers = Layers([trace.num_experts] * trace.num_layers, [slots] * trace.num_layers)
    for step in iterate(trace, schedule(trace, batch)):
        layers.step(np.ascontiguousarray(step.ids_TLK.transpose(1, 0, 2)))
    layers.check_integrity()
    return layers.count("hits")


@given(
    trace=st.builds(
        random_trace,
        st.integers(0, 10_000),
        tokens=st.integers(1, 60),
        layers=st.integers(1, 4),
        experts=st.integers(4, 12),
        top_k=st.integers(1, 4),
        sequences=st.integers(1, 5),
        skew=st.sampled_from([0.0, 0.5, 2.0]),
    ),
    cache=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]),
    batch=st.integers(1, 4),
)
def test_hits_are_those_of_the_simulator(trace, cache, batch):
    simulated = replay(trace, "adaptive", [cache], batch=batch)
    assert hits_of_the_engine(trace, cache, batch) == simulated.load_hits_C[0]


@pytest.mark.parametrize(("cache", "batch"), [(0.25, 1), (0.5, 1), (0.5, 4)])
def test_hits_are_those_of_the_simulator_over_a_long_trace(cache, batch):
    random = np.random.default_rng(7)
    popularity = np.log(1 / random.permuted(np.tile(np.arange(1, 33), (8, 1)), axis=1))
    ids_TLK = np.argsort(-(popularity + random.gumbel(size=(800, 8, 32))), -1)[..., :4]
    trace = trace_of(ids_TLK, 32, [200] * 4)
    simulated = replay(trace, "adaptive", [cache], batch=batch).load_hits_C[0]
    assert simulated != replay(trace, "lru", [cache], batch=batch).load_hits_C[0]
    assert hits_of_the_engine(trace, cache, batch) == simulated


@pytest.mark.traces
@pytest.mark.parametrize(
    ("name", "cache", "batch"),
    [
        ("deepseek-v2-lite.intent", 0.25, 1),
        ("deepseek-v2-lite.summary", 0.5, 4),
        ("qwen3-30b-a3b.chat", 0.125, 1),
        ("qwen3-30b-a3b.chat", 0.5, 1),
    ],
)
def test_hits_are_those_of_the_simulator_on_recorded_traces(name, cache, batch):
    whole = load(*recorded(name))
    starts = np.unique(np.minimum(whole.sequence_starts, 400))
    trace = trace_of(whole.expert_ids[:400], whole.num_experts, np.diff(starts))
    simulated = replay(trace, "adaptive", [cache], batch=batch)
    assert hits_of_the_engine(trace, cache, batch) == simulated.load_hits_C[0]


@dataclass(frozen=True)
class Run:
    experts: list[int]
    slots: list[int]
    steps: list[tuple[bool, list[torch.Tensor]]]


@st.composite
def runs(draw) -> Run:
    """Layers of unlike shape, and steps with and without eviction, padding and repetition."""
    experts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    slots = [draw(st.integers(0, e)) for e in experts]
    steps = []
    for _ in range(draw(st.integers(1, 25))):
        tokens, choices = draw(st.integers(0, 3)), draw(st.integers(1, 3))
        ids_LTK = [
            torch.tensor(
                draw(st.lists(st.integers(-1, e - 1), min_size=tokens * choices,
                              max_size=tokens * choices)),
                dtype=torch.int32,
            ).view(tokens, choices)
            for e in experts
        ]  # fmt: skip
        steps.append((draw(st.sampled_from([True, True, True, False])), ids_LTK))
    return Run(experts, slots, steps)


@settings(max_examples=150)
@given(runs())
def test_invariants(run):
    layers = Layers(run.experts, run.slots)
    # As much credit as can be, so that the leader's order is followed from the start.
    layers.eviction.tables.standing[Standing.BALANCE] = HIT * (sum(run.slots) + len(run.slots))
    for evict, ids_LTK in run.steps:
        before = [layers.resident(layer) for layer in range(len(run.experts))]
        layers.step(ids_LTK, evict=evict)
        layers.check_integrity()
        for layer, ids_TK in enumerate(ids_LTK):
            active = set(ids_TK.flatten().tolist()) - {-1}
            after = layers.resident(layer)
            assert before[layer] & active <= after, "evicted an expert that the step reads"
            assert after - before[layer] <= active
            assert len(after) == min(run.slots[layer], len(before[layer] | active))
            if not evict:
                assert before[layer] <= after


@given(runs())
def test_as_many_experts_are_resident_as_under_lru(run):
    """No slot is left empty or lost whatever the order."""
    ours, lru = Layers(run.experts, run.slots), Layers(run.experts, run.slots, "lru")
    for evict, ids_LTK in run.steps:
        for layers in (ours, lru):
            layers.step(ids_LTK, evict=evict)
        for layer in range(len(run.experts)):
            assert len(ours.resident(layer)) == len(lru.resident(layer))


@given(runs())
def test_without_credit_it_is_lru(run):
    """With nothing to lose, layers evict as LRU's cache tells, and that is LRU."""
    ours, lru = Layers(run.experts, run.slots), Layers(run.experts, run.slots, "lru")
    for _, ids_LTK in run.steps:
        if any(len(ids_TK.unique()) > s for ids_TK, s in zip(ids_LTK, run.slots, strict=True)):
            continue  # more experts than slots: who was streamed counts as used here, not there
        ours.eviction.tables.standing[Standing.BALANCE] = -HIT * 10_000
        for layers in (ours, lru):
            layers.step(ids_LTK)
        for layer in range(len(run.experts)):
            assert ours.resident(layer) == lru.resident(layer)


@given(runs(), st.data())
def test_filled_slots_are_given_up_as_under_lru(run, data):
    """A fill is no gain and no loss: what it puts into the slots LRU would hold as well."""
    ours, lru = Layers(run.experts, run.slots), Layers(run.experts, run.slots, "lru")
    for _, ids_LTK in run.steps[:5]:
        ours.step(ids_LTK)
    for layer, (experts, slots) in enumerate(zip(run.experts, run.slots, strict=True)):
        hottest = data.draw(st.permutations(range(experts)))[:slots]
        hottest = torch.tensor(hottest, dtype=torch.int32)
        for layers in (ours, lru):
            layers.residency[layer].fill(hottest)
        ours.eviction.note_fill(layer, hottest)
    ours.check_integrity()
    for _, ids_LTK in run.steps[5:]:
        if any(len(ids_TK.unique()) > s for ids_TK, s in zip(ids_LTK, run.slots, strict=True)):
            continue  # as above
        ours.eviction.tables.standing[Standing.BALANCE] = -HIT * 10_000
        ours.eviction.tables.row_L.fill_(AS_LRU)
        for layers in (ours, lru):
            layers.step(ids_LTK)
        for layer in range(len(run.experts)):
            assert ours.resident(layer) == lru.resident(layer)


def hot_and_cold(step: int) -> list[list[list[int]]]:
    """Two hot experts, and others that come by once; in both of two layers."""
    return [[[step % 2, 2 + step % 10]]] * 2


def test_hot_experts_stay():
    ours, lru = (Layers([12, 12], [3, 3], policy) for policy in ("adaptive", "lru"))
    for step in range(300):
        ours.step(hot_and_cold(step))
        lru.step(hot_and_cold(step))
    assert {0, 1} <= ours.resident()
    assert ours.leader != LRU
    assert ours.count("hits") > lru.count("hits")


def test_the_sequel_ranks_first_what_comes_soon():
    """Eight groups of four experts in turn: all are used alike, only their company tells."""
    layers = Layers([32, 32], [8, 8])
    for step in range(400):
        layers.step([[[4 * (step % 8) + n for n in range(4)]]] * 2)
    order_E = layers.eviction.tables.rank_LRE[0, SEQUEL].argsort(descending=True)
    soon = {4 * ((399 + later) % 8) + n for later in SOON for n in range(4)}
    assert set(order_E[: len(soon)].tolist()) == soon


def test_gains_have_a_ceiling():
    layers = Layers([12, 12], [3, 3])
    layers.eviction.tables.standing[Standing.BALANCE] = 2**40
    layers.step(hot_and_cold(0))
    assert layers.balance == HIT * (3 + 3 + 2)


def test_a_sweep_teaches_nothing():
    layers = Layers([12, 12], [3, 3])
    for step in range(20):
        layers.step(hot_and_cold(step))
    state = {name: table.clone() for name, table in vars(layers.eviction.tables).items()}
    layers.step([[[4, 5]]] * 2, evict=False)
    for name, table in vars(layers.eviction.tables).items():
        assert torch.equal(table, state[name]), name


def test_what_a_sweep_brought_in_is_no_gain():
    """LRU would have taken the same experts into its empty slots."""
    layers = Layers([12, 12], [6, 6])
    layers.step([[list(range(6))]] * 2, evict=False)
    before = layers.balance
    layers.step([[[0, 1]]] * 2)
    assert layers.count("hits") == 4
    assert 0 < layers.balance - before < HIT


def test_a_layer_that_reads_nothing_learns_nothing():
    layers = Layers([12, 12], [3, 3])
    for step in range(20):
        layers.step(hot_and_cold(step))
    tables = layers.eviction.tables
    names = ("average_LFE", "rank_LRE", "history_LE", "sequel_LEE")
    before = {name: getattr(tables, name).clone() for name in names}
    layers.step([[[-1, -1]], [[0, 5]]])
    for name, table in before.items():
        assert torch.equal(getattr(tables, name)[0], table[0])
        assert not torch.equal(getattr(tables, name)[1], table[1])


def test_a_step_without_active_ids_changes_nothing():
    layers = Layers([12, 12], [3, 3])
    for step in range(20):
        layers.step(hot_and_cold(step))
    state = {name: table.clone() for name, table in vars(layers.eviction.tables).items()}
    layers.step([[[-1, -1]]] * 2)
    for name, table in vars(layers.eviction.tables).items():
        assert torch.equal(table, state[name]), name


def test_forgetting_keeps_residents():
    layers, fresh = Layers([12, 12], [3, 3]), Layers([12, 12], [3, 3])
    for step in range(50):
        layers.step(hot_and_cold(step))
    resident = layers.resident()
    layers.eviction.forget()
    assert layers.resident() == resident
    for name, table in vars(fresh.eviction.tables).items():
        if name != "slot_of_LE":
            assert torch.equal(getattr(layers.eviction.tables, name), table), name
    layers.step(hot_and_cold(0))
    layers.check_integrity()


@given(
    steps=st.lists(
        st.lists(st.integers(0, 11), min_size=1, max_size=3) | st.integers(0, 6), max_size=40
    )
)
def test_slots_may_open_and_close(steps):
    layers = Layers([12, 12], [6, 6])
    layers.eviction.tables.standing[Standing.BALANCE] = 14 * HIT
    for what in steps:
        if isinstance(what, int):
            layers.residency.open_from(what)
        else:
            layers.step([[what]] * 2)
            lru_L = ((layers.eviction.tables.held_LE >> LRU) & 1).sum(1)
            assert lru_L.tolist() == [len(layers.resident(layer)) for layer in range(2)]
        layers.check_integrity()


def test_closing_slots_is_no_loss():
    """LRU would have had to give them up as well."""
    layers = Layers([12, 12], [6, 6])
    for step in range(20):
        layers.step([[list(range(step % 2, step % 2 + 6))]] * 2)
    layers.residency.open_from(3)
    before = layers.balance
    layers.step([[[0, 1, 2]]] * 2)
    assert before <= layers.balance < before + HIT


def spoil(layers: Layers, kind: str) -> None:
    tables = layers.eviction.tables
    if kind == "rank":
        tables.rank_LRE[0, 2] = tables.rank_LRE[0, 2].roll(1)
    elif kind == "slots":
        tables.held_LE[1] |= 1 << LRU
    elif kind == "candidates":
        tables.held_LE[1, 0] |= 1 << CANDIDATES
    elif kind == "sequel":
        tables.sequel_LEE[0, 1, 2] = -1
    elif kind == "expected":
        tables.expected_LE[0, 0] = 1
    elif kind == "average":
        tables.average_LFE[0, 0, 0] = float("nan")
    elif kind == "row":
        tables.row_L[0] = -1
    else:
        tables.standing[Standing.BALANCE] = 2**40


@pytest.mark.parametrize(
    "kind",
    ["rank", "slots", "candidates", "sequel", "expected", "average", "row", "balance"],
)
def test_integrity_notices(kind):
    layers = Layers([12, 12], [3, 3])
    for step in range(20):
        layers.step(hot_and_cold(step))
    layers.check_integrity()
    spoil(layers, kind)
    with pytest.raises(AssertionError):
        layers.eviction.check_integrity()


def taught(slots: int = 4) -> Layers:
    trace = random_trace(5, tokens=60, layers=3, experts=12, top_k=3)
    layers = Layers([12] * 3, [slots] * 3)
    for step in iterate(trace, schedule(trace, 1)):
        layers.step(np.ascontiguousarray(step.ids_TLK.transpose(1, 0, 2)))
    return layers


def test_what_was_learned_outlasts_a_restart():
    old = taught()
    arrays = old.eviction.to_arrays()
    new = Layers([12] * 3, [4] * 3)
    new.eviction.from_arrays(arrays)
    new.check_integrity()
    for name, array in new.eviction.to_arrays().items():
        assert np.array_equal(array, arrays[name])
    assert (new.leader, new.balance) == (old.leader, old.balance)
    assert arrays["sequel_LEE"].any()
    ids_LTK = np.zeros((3, 1, 3), np.int64) + np.arange(3)
    before = arrays["average_LFE"].copy()
    old.step(ids_LTK)
    assert np.array_equal(arrays["average_LFE"], before), "what was taken does not change"
    new.step(ids_LTK)
    new.check_integrity()


def test_a_restart_with_fewer_slots():
    arrays = taught().eviction.to_arrays()
    arrays["standing"][Standing.BALANCE] = 10**12
    fewer = Layers([12] * 3, [1] * 3)
    fewer.eviction.from_arrays(arrays)
    fewer.check_integrity()


NO_SUCH_LEADER = CANDIDATES * (np.arange(len(Standing)) == Standing.LEADER)


@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("average_LFE", [lambda a: a + 1, lambda a: a * np.nan, lambda a: a.astype(np.float64)]),
        ("sequel_LEE", [lambda a: a - 1 - a.max(), lambda a: a[:, :-1]]),
        ("votes_M", [lambda a: a - 1e6, lambda a: a[:-1]]),
        ("standing", [lambda a: a + NO_SUCH_LEADER, lambda a: a.astype(np.int32)]),
    ],
)
def test_damaged_or_foreign_tables_are_refused(name, damages):
    good = taught().eviction.to_arrays()
    for array in (None, *(damage(good[name]) for damage in damages)):
        fresh = Layers([12] * 3, [4] * 3).eviction
        start = fresh.to_arrays()
        arrays = {n: a for n, a in {**good, name: array}.items() if a is not None}
        with pytest.raises(OffloadError, match=name):
            fresh.from_arrays(arrays)
        for key, value in fresh.to_arrays().items():
            assert np.array_equal(value, start[key]), "nothing of it is taken"
