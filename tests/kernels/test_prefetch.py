"""``look_ahead`` and ``learn_transitions`` against their torch forms: equal to the last bit.

Legend: T tokens, K choices a token, L layers, E experts, S slots, N matrices, M tokens at most.
"""

from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_moe_offload.kernels import prefetch as module
from vllm_moe_offload.kernels.fixed_point import LEAST_DEMAND, ONE, RECENT_CHOICE_BITS
from vllm_moe_offload.kernels.predict import (
    EamTables,
    GateLogits,
    MarkovTables,
    demand_torch,
    learn_transitions,
    learn_transitions_torch,
    powers,
)
from vllm_moe_offload.kernels.prefetch import (
    OFF,
    Ahead,
    LayerAhead,
    Outlook,
    look_ahead,
    look_ahead_torch,
)
from vllm_moe_offload.kernels.resolve import (
    NEVER,
    NOWHERE,
    Counter,
    EvictionOrder,
    ResidencyTables,
    WorkList,
    resolve_torch,
)

KINDS = ("markov", "eam", "gate")
POISON = -77
M, L, N = 40, 3, 8


@dataclass(frozen=True)
class Case:
    seed: int
    kind: str
    num_experts: int
    num_slots: int
    tokens: int
    top_k: int
    rows: int
    inactive: float
    dtype: torch.dtype
    layer: int


@st.composite
def cases(draw) -> Case:
    num_experts = draw(st.integers(1, 40))
    return Case(
        seed=draw(st.integers(0, 2**20)),
        kind=draw(st.sampled_from(KINDS)),
        num_experts=num_experts,
        num_slots=draw(st.integers(0, num_experts)),
        tokens=draw(st.sampled_from((0, 1, 1, 2, 4, 5, 17, M))),
        top_k=draw(st.integers(1, min(4, num_experts))),
        rows=draw(st.sampled_from((OFF, 0, 1, 2, 40))),
        inactive=draw(st.sampled_from((0.0, 0.3, 1.0))),
        dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        layer=draw(st.integers(0, L - 1)),
    )


def routed(case: Case, device) -> torch.Tensor:
    ids_TK = torch.rand(case.tokens, case.num_experts).argsort(1)[:, : case.top_k]
    ids_TK[torch.rand(ids_TK.shape) < case.inactive] = NOWHERE
    return ids_TK.to(device, case.dtype)


def markov_tables(experts: int, device) -> MarkovTables:
    def random(low, high, *shape, dtype=torch.int32):
        return torch.randint(low, high, shape, dtype=dtype).to(device)

    prior = random(-1000, 0, L, experts)
    return MarkovTables(
        evidence_LEE=random(-800, 1500, L - 1, experts, experts, dtype=torch.int16),
        prior_LE=prior,
        bias_LE=prior + random(-900, 0, L, experts),
        count_LEE=random(0, 9, L - 1, experts, experts),
        use_LE=random(0, 99, L, experts),
        recent_LE=random(0, 1 << 15, L, experts),
        tokens=torch.tensor([7], device=device),
        of_recent=random(-2000, 0, (1 << RECENT_CHOICE_BITS) + 1),
        powers=powers(device),
    )


def source_of(case: Case, device):
    experts = case.num_experts
    if case.kind == "markov":
        return markov_tables(experts, device)
    if case.kind == "gate":
        logits = torch.randn(case.tokens, experts) * 3
        return GateLogits(logits.bfloat16().to(device), powers(device))
    counts = torch.randint(0, 60, (L, experts, N), dtype=torch.int16)
    counts[torch.rand(counts.shape) < 0.5] = 0
    norms = counts.float().square().sum(1).cumsum(0).sqrt()
    return EamTables(
        counts.to(device),
        (1 / norms.clamp(min=1e-9)).to(device),
        torch.randint(0, N + 1, (1,), dtype=torch.int32).to(device),
        torch.randint(0, 200, (M, N), dtype=torch.int32).to(device),
    )


def random_order(case: Case, device) -> EvictionOrder:
    """Two orders of the experts, of which one is in force."""
    experts = case.num_experts
    return EvictionOrder(
        rank_RE=torch.rand(2, experts).argsort(1).int().to(device),
        row=torch.randint(2, (1,), dtype=torch.int32).to(device),
        use_E=torch.zeros(experts, dtype=torch.int8, device=device),
        slot_of_E=torch.zeros(experts, dtype=torch.int32, device=device),
    )


def random_side(case: Case, device) -> LayerAhead:
    """Slots filled in part, of several ages, as they are before the layer is resolved."""
    order = random_order(case, device) if case.seed % 5 > 2 else None
    tables = ResidencyTables.empty(case.num_experts, case.num_slots, device, order)
    clock = case.seed % 3 * 2**33 + 5
    count = case.num_slots if case.seed % 2 else int(torch.randint(case.num_slots + 1, ()))
    slots = torch.randperm(case.num_slots)[:count].to(device)
    experts = torch.randperm(case.num_experts)[:count].to(device)
    tables.slot_of_E[experts] = slots.int()
    tables.expert_of_S[slots] = experts.int()
    tables.stamp_S[slots] = clock - torch.randint(1, 5, (count,)).to(device)
    tables.clock.fill_(clock)
    work = WorkList.empty(case.num_experts, device)
    for tensor in (work.load_expert_E, work.load_slot_E):
        tensor.fill_(POISON)
    ahead_E = torch.zeros(case.num_experts, dtype=torch.int8, device=device)
    return LayerAhead(tables, work, ahead_E)


def copy(item, device=None):
    """Of tensors and records of them; to the device, if one is given."""
    if isinstance(item, torch.Tensor):
        return item.to(device or item.device, copy=True)
    if item is None:
        return None
    whole = {name: copy(value, device) for name, value in vars(item).items()}
    if isinstance(item, ResidencyTables) and item.order is not None:
        whole["slot_of_E"] = whole["order"].slot_of_E
    return replace(item, **whole)


def tensors(item) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in vars(item).items():
        if value is not None:
            found |= {name: value} if isinstance(value, torch.Tensor) else tensors(value)
    return found


def assert_same(item, expected) -> None:
    expected = tensors(expected)
    for name, tensor in tensors(item).items():
        assert torch.equal(tensor, expected[name]), name


def outlook(case: Case, device) -> Outlook:
    return Outlook(
        rows=torch.tensor([case.rows], dtype=torch.int32, device=device),
        ids_LTK=torch.full((L, M, case.top_k), POISON, dtype=torch.int32, device=device),
        demand_E=torch.zeros(case.num_experts, dtype=torch.int32, device=device),
    )


@given(case=cases())
def test_look_ahead(case, device):
    torch.manual_seed(case.seed)
    own, following = random_side(case, device), random_side(case, device)
    own.ahead_E.copy_(torch.randint(0, 2, own.ahead_E.shape) * torch.randint(1, 3, ()) * 3 // 2)
    following = None if case.layer == L - 1 else following
    source = None if following is None else source_of(case, device)
    shared = outlook(case, device)
    ids_TK = routed(case, device)
    expected = copy(own), copy(following), copy(source), copy(shared)
    look_ahead(ids_TK, case.layer, own, following, source, shared)
    look_ahead_torch(ids_TK, case.layer, *expected)
    assert_same(own, expected[0])
    if following is not None:
        assert_same(following, expected[1])
        assert_same(source, expected[2])
    assert_same(shared, expected[3])


@pytest.mark.parametrize("kind", KINDS)
def test_look_ahead_in_one_launch_or_two(kind, device):
    case = Case(1, kind, 33, 9, 6, 3, 4, 0.1, torch.int32, 1)
    torch.manual_seed(3)
    own, following = random_side(case, device), random_side(case, device)
    source, shared, ids_TK = source_of(case, device), outlook(case, device), routed(case, device)
    others = copy(own), copy(following), copy(source), copy(shared)
    with mock.patch.object(module, "FUSED_TOKENS", 6):
        look_ahead(ids_TK, 1, own, following, source, shared)
    look_ahead(ids_TK, 1, *others)
    for item, other in zip((own, following, source, shared), others, strict=True):
        assert_same(item, other)


@pytest.mark.parametrize("kind", KINDS)
def test_look_ahead_at_its_limits(kind, device):
    case = Case(1, kind, 1024, 700, 3, 8, 1024, 0.0, torch.int32, 1)
    torch.manual_seed(5)
    own, following = random_side(case, device), random_side(case, device)
    source, shared, ids_TK = source_of(case, device), outlook(case, device), routed(case, device)
    expected = copy(own), copy(following), copy(source), copy(shared)
    look_ahead(ids_TK, 1, own, following, source, shared)
    look_ahead_torch(ids_TK, 1, *expected)
    assert_same(following, expected[1])


@given(
    seed=st.integers(0, 2**20), experts=st.integers(1, 40),
    tokens=st.sampled_from((0, 1, 3, M)), inactive=st.sampled_from((0.0, 0.4)),
)  # fmt: skip
def test_learn_transitions(seed, experts, tokens, inactive, device):
    torch.manual_seed(seed)
    tables = markov_tables(experts, device)
    ids_LTK = torch.randint(experts, (L, M, 3), dtype=torch.int32)
    ids_LTK[torch.rand(ids_LTK.shape) < inactive] = NOWHERE
    ids_LTK = ids_LTK.to(device)
    expected = copy(tables)
    learn_transitions(ids_LTK, tokens, tables)
    learn_transitions_torch(ids_LTK, tokens, expected)
    assert_same(tables, expected)


@given(case=cases())
def test_demand_is_that_of_the_tokens_one_by_one(case, device):
    torch.manual_seed(case.seed)
    case = replace(case, layer=min(case.layer, L - 2))
    source, ids_TK = source_of(case, device), routed(case, device)
    whole = demand_torch(ids_TK, copy(source), case.layer)
    total = torch.zeros_like(whole)
    for token in range(case.tokens):
        alone = copy(source)
        if case.kind == "gate":
            alone = GateLogits(source.logits_TE[token : token + 1], source.powers)
        if case.kind == "eam":
            alone = replace(alone, product_MN=alone.product_MN[token : token + 1])
        demand_E = demand_torch(ids_TK[token : token + 1], alone, case.layer)
        assert bool((demand_E >= 0).all())
        assert int(demand_E.max()) <= ONE
        assert int(ids_TK[token].max()) >= 0 or not demand_E.any()
        total += demand_E
    assert torch.equal(whole, total)


@given(case=cases())
def test_what_is_fetched_and_who_goes(case, device):
    """The invariants of admission, on the torch form."""
    torch.manual_seed(case.seed)
    case = replace(case, layer=min(case.layer, L - 2))
    own, following = random_side(case, device), random_side(case, device)
    source, shared, ids_TK = source_of(case, device), outlook(case, device), routed(case, device)
    before = copy(following.tables)
    demand_E = demand_torch(ids_TK, copy(source), case.layer)
    look_ahead_torch(ids_TK, case.layer, own, following, source, shared)
    tables, count = following.tables, int(following.work.num_loads)
    assert count <= max(0, case.rows)
    fetched = following.work.load_expert_E[:count].long()
    slots = following.work.load_slot_E[:count].long()
    evicted = before.expert_of_S[slots].long()
    evicted = evicted[evicted >= 0]
    assert bool((demand_E[fetched] >= LEAST_DEMAND).all())
    if count and evicted.numel():
        assert int(demand_E[evicted].max()) <= int(demand_E[fetched].min())
    assert bool((before.slot_of_E[fetched] == NOWHERE).all())
    assert bool((tables.stamp_S[slots] == tables.clock - 1).all())
    assert bool((following.ahead_E[fetched] == Ahead.GUESSED | Ahead.FETCHED).all())
    assert int(following.work.counters[Counter.PREFETCHED]) == count
    # The coming step keeps those that it reads, whatever else it misses.
    missing = torch.nonzero(tables.slot_of_E == NOWHERE).flatten()
    resolve_torch(torch.cat([missing, fetched])[None], tables, following.work, evict=True)
    assert torch.equal(tables.slot_of_E[fetched].long(), slots)


def test_what_was_fetched_in_vain_goes_first(device):
    case = Case(1, "markov", 8, 4, 1, 2, 2, 0.0, torch.int32, 1)
    own, shared = random_side(case, device), outlook(case, device)
    tables = own.tables
    tables.slot_of_E.fill_(NOWHERE)
    tables.expert_of_S.copy_(torch.tensor([0, 1, 2, 3]))
    tables.slot_of_E[:4] = torch.arange(4)
    tables.stamp_S.copy_(torch.tensor([5, 9, 9, 8]))
    own.ahead_E[1] = own.ahead_E[2] = Ahead.GUESSED | Ahead.FETCHED
    own.ahead_E[5] = Ahead.GUESSED
    ids_TK = torch.tensor([[1, 3]], device=device)
    look_ahead_torch(ids_TK, L - 1, own, None, None, shared)
    assert tables.stamp_S.tolist() == [5, 9, NEVER, 8]
    counts = {counter.name: int(own.work.counters[counter]) for counter in Counter}
    assert (counts["GUESSED"], counts["FOUND"], counts["FORESEEABLE"]) == (3, 1, 2)
    assert counts["PREFETCH_HITS"] == 1
    assert not own.ahead_E.any()
