"""``learn`` against its torch form: equal to the last bit, from any state.

Legend: L layers, E experts, S slots, F averages.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_moe_offload.kernels.candidates import (
    EXPERT_BITS,
    FAINT,
    HIT,
    LRU,
    MAX_AGE,
    SEQUEL_UNIT,
    SOON,
)
from vllm_moe_offload.kernels.learn import (
    AS_LRU,
    CANDIDATES,
    FIGURES,
    AdaptiveTables,
    Standing,
    learn,
    learn_torch,
)
from vllm_moe_offload.kernels.resolve import ResidencyTables, Use, WorkList, resolve, resolve_torch

POISON = -77


@dataclass(frozen=True)
class Case:
    seed: int
    experts: tuple[int, ...]
    slots: tuple[int, ...]
    activity: float
    balance: int


@st.composite
def cases(draw) -> Case:
    experts = draw(st.lists(st.integers(1, 40) | st.sampled_from((63, 64, 65)), min_size=1,
                            max_size=3))  # fmt: skip
    slots = [draw(st.integers(0, e) | st.sampled_from((0, e))) for e in experts]
    return Case(
        seed=draw(st.integers(0, 2**20)),
        experts=tuple(experts),
        slots=tuple(slots),
        activity=draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))),
        balance=draw(st.sampled_from((-(2**40), -1, 0, HIT, 3 * HIT, 40 * HIT, 2**40))),
    )


def inside(case: Case) -> torch.Tensor:
    """Experts that the layers have, [L, E]."""
    return torch.arange(max(case.experts)) < torch.tensor(case.experts)[:, None]


def random_tables(case: Case, device: torch.device) -> AdaptiveTables:
    """Draw a state, not one that steps have led to; scratch is poisoned."""
    torch.manual_seed(case.seed)
    tables = AdaptiveTables.empty(case.experts, case.slots, device)
    inside_LE = inside(case)
    shape = inside_LE.shape

    # Hot, cold, all but forgotten and never used experts; few values, so that some are equal.
    values = torch.tensor([1.0, 0.5, 0.25, 2.0**-20, FAINT, 3e-5, 0.7])
    average_LFE = values[torch.randint(len(values), tables.average_LFE.shape)]
    used_LE = (torch.rand(shape) < 0.8) & inside_LE
    tables.average_LFE.copy_(average_LFE * used_LE[:, None])
    ages = torch.tensor([0, 1, 2, 3, 1000, MAX_AGE - 1, MAX_AGE])
    age_LE = torch.where(used_LE, ages[torch.randint(len(ages), shape)], MAX_AGE)
    expert_E = torch.arange(shape[1])
    tables.rank_LRE[:, LRU] = (((MAX_AGE - age_LE) << EXPERT_BITS) | expert_E).int()

    # Ranks of all orders are as if a layer had learned before, no two of a layer alike.
    others = torch.randint(1 << 8, tables.rank_LRE.shape) << EXPERT_BITS
    tables.rank_LRE[:, LRU + 1 :] = (others | expert_E).int()[:, LRU + 1 :]
    tables.history_LE.copy_(torch.randint(1 << (SOON[-1] + 1), shape) * inside_LE)
    most = SEQUEL_UNIT * len(SOON)
    pairs_LEE = torch.randint(most + 1, tables.sequel_LEE.shape)
    pairs_LEE *= torch.rand(tables.sequel_LEE.shape) < 0.7
    tables.sequel_LEE.copy_(pairs_LEE * inside_LE[:, :, None] * inside_LE[:, None])
    full_LME = torch.rand(shape[0], CANDIDATES, shape[1]).argsort(2)
    held_LME = (full_LME < tables.slots_L.cpu()[:, None, None]) & inside_LE[:, None]
    held_LME &= torch.rand(shape[0], CANDIDATES, 1) < 0.8  # the others have empty slots
    bit_M1 = (1 << torch.arange(CANDIDATES))[:, None]
    tables.held_LE.copy_((held_LME * bit_M1).sum(1))
    tables.votes_M.copy_(torch.randint(90, (CANDIDATES,)) * 0.37)
    tables.standing[Standing.BALANCE] = case.balance
    tables.standing[Standing.LEADER] = int(torch.randint(CANDIDATES, ()))
    tables.standing[Standing.TURN] = int(torch.randint(shape[0], ()))
    tables.slot_of_LE.copy_(torch.where(inside_LE, torch.randint(-1, 9, shape), -1))
    tables.row_L.fill_(POISON)
    tables.figures_LN.fill_(POISON)
    return tables


def random_use(case: Case) -> torch.Tensor:
    """Draw what resolve might have noted; at times a layer reads nothing."""
    inside_LE = inside(case)
    active_LE = (torch.rand(inside_LE.shape) < case.activity) & inside_LE
    active_LE &= torch.rand(inside_LE.shape[0])[:, None] < 0.8
    resident_LE = (torch.rand(inside_LE.shape) < 0.5) & inside_LE
    # Of every other layer as many as there are slots, if it has them.
    full_LE = torch.rand(inside_LE.shape).argsort(1) < torch.tensor(case.slots)[:, None]
    resident_LE[::2] = (full_LE & inside_LE)[::2]
    return (Use.ACTIVE * active_LE + Use.RESIDENT * resident_LE).to(torch.int8)


def clone(tables: AdaptiveTables) -> AdaptiveTables:
    return replace(tables, **{name: tensor.clone() for name, tensor in vars(tables).items()})


def assert_same(tables: AdaptiveTables, expected: AdaptiveTables) -> None:
    for name, tensor in vars(tables).items():
        if name != "figures_LN":
            torch.testing.assert_close(
                tensor, getattr(expected, name), rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def run_both(case: Case, device: torch.device, *, steps: int) -> None:
    tables = random_tables(case, device)
    expected = clone(tables)
    for _ in range(steps):
        for each in (tables, expected):
            torch.manual_seed(case.seed + 1)
            each.use_LE.copy_(random_use(case))
        learn(tables)
        learn_torch(expected)
        assert_same(tables, expected)
        assert not tables.use_LE.any()


@settings(max_examples=60)
@given(case=cases())
@example(case=Case(63102, (63, 6), (38, 0), 0.5, -1))  # more residents than slots
def test_learn(case, device):
    run_both(case, device, steps=2)


@pytest.mark.parametrize("experts", [256, 999, 1024])
def test_learn_at_its_limits(experts, device):
    run_both(Case(0, (experts, 40), (experts // 3, 40), 0.3, 2 * HIT), device, steps=1)


def test_learn_over_more_layers_than_are_added_up_at_once(device):
    run_both(Case(2, (4,) * 66, (2,) * 66, 0.5, 30 * HIT), device, steps=1)


def test_figures_have_their_places():
    assert AS_LRU + 1 == FIGURES // 2


def test_a_few_steps_with_resolve(device):
    """Both forms of both operations, from empty slots on, as an engine runs them."""
    layers, experts, slots = 3, 20, 6
    states = []
    for _ in range(2):
        tables = AdaptiveTables.empty([experts] * layers, [slots] * layers, device)
        tables.standing[Standing.BALANCE] = 2 * HIT  # to become free within a few steps
        residency = [
            ResidencyTables.empty(experts, slots, device, tables.order(layer, experts))
            for layer in range(layers)
        ]
        states.append((tables, residency, WorkList.empty(experts, device)))
    (tables, residency, work), (expected, expected_residency, expected_work) = states
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        tokens = 1 + step % 3
        scores = torch.rand(layers, tokens, experts, generator=generator)
        ids_LTK = (scores + 0.1 * torch.arange(experts)).topk(4).indices.to(device)
        for layer, ids_TK in enumerate(ids_LTK):
            resolve(ids_TK, residency[layer], work, evict=True)
            resolve_torch(ids_TK, expected_residency[layer], expected_work, evict=True)
            assert torch.equal(residency[layer].expert_of_S, expected_residency[layer].expert_of_S)
        learn(tables)
        learn_torch(expected)
        assert_same(tables, expected)
    assert set(tables.row_L.tolist()) - {AS_LRU}, "no layer ever became free"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_graph_learns_from_other_steps(device):
    case = Case(5, (128,) * 48, (32,) * 48, 0.06, 20 * HIT)
    tables = random_tables(case, device)
    use_LE = tables.use_LE.clone()
    learn(clone(tables))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        tables.use_LE.copy_(use_LE)
        learn(tables)
    expected = clone(tables)
    for step in range(20):
        torch.manual_seed(step)
        use_LE.copy_(random_use(case))
        graph.replay()
        expected.use_LE.copy_(use_LE)
        learn_torch(expected)
        assert_same(tables, expected)
