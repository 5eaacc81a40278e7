"""The engine's predictors by themselves: what they learn, keep and cover.

Legend: T tokens, L layers, K choices a token, E experts, H hidden size.
"""

import numpy as np
import pytest
import torch
from traces import random_trace, recorded

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.fixed_point import FRACTION_BITS
from vllm_moe_offload.kernels.predict import demand_torch
from vllm_moe_offload.predictors.eam import EamPredictor
from vllm_moe_offload.predictors.figures import MOST_TOKENS, REFRESH, WINDOW
from vllm_moe_offload.predictors.gate import GatePredictor
from vllm_moe_offload.predictors.markov import MarkovPredictor
from vllm_moe_offload.predictors.sizes import table_bytes
from vllm_moe_offload.simulate.predictors import MarkovPredictor as SimulatedMarkov
from vllm_moe_offload.simulate.predictors import best_guesses
from vllm_moe_offload.simulate.steps import iterate, schedule
from vllm_moe_offload.trace import load

HOST = torch.device("cpu")
M = 16


def make(name, trace):
    layers, experts = trace.num_layers, trace.num_experts
    if name == "markov":
        return MarkovPredictor(layers, experts, HOST)
    return EamPredictor(layers, experts, M, HOST)


def steps_of(trace, batch=1):
    return iterate(trace, schedule(trace, batch))


def ids_of(step):
    """As the engine keeps them: int32 [L, M, K] with rows that belong to no token."""
    tokens, layers, top_k = step.ids_TLK.shape
    ids_LTK = torch.full((layers, M, top_k), -1, dtype=torch.int32)
    ids_LTK[:, :tokens] = torch.from_numpy(step.ids_TLK).int().transpose(0, 1)
    return ids_LTK


def learn_step(predictor, step):
    predictor.learn(ids_of(step), len(step.ids_TLK))
    predictor.refresh()
    if isinstance(predictor, EamPredictor):
        predictor.settle()  # Steps go faster here than the thread that collects.


def learn(predictor, trace):
    for step in steps_of(trace):
        learn_step(predictor, step)


def coverage(predictor, trace, count, every=1):
    """Share of the routed experts among ``count`` guesses, asked each ``every``-th step."""
    found = routed = 0
    x_TH = torch.empty(1, 0)
    for step in steps_of(trace):
        for layer in range(trace.num_layers - 1 if step.number % every == 0 else 0):
            ids_TK = torch.from_numpy(step.ids_TLK[:, layer])
            demand_E = demand_torch(ids_TK, predictor.source(layer, x_TH), layer)
            guess = best_guesses(demand_E.numpy()[None], count)[0]
            found += int((guess & step.active_LE[layer + 1]).sum())
            routed += int(step.active_LE[layer + 1].sum())
        learn_step(predictor, step)
    return found / routed


def test_markov_counts_what_the_simulator_counts():
    trace = random_trace(3, tokens=2 * REFRESH, layers=4, experts=12)
    predictor, simulated = make("markov", trace), SimulatedMarkov(4, 12)
    learn(predictor, trace)
    for step in steps_of(trace):
        simulated.learn(step)
    predictor.make_evidence()
    simulated._refresh()
    tables = predictor.tables
    assert np.array_equal(tables.count_LEE, simulated._count_LEE)
    assert np.array_equal(tables.use_LE, simulated._use_LE)
    assert int(tables.tokens) == simulated._tokens
    unit = np.log(2) / (1 << FRACTION_BITS)
    assert tables.evidence_LEE.numpy() * unit == pytest.approx(simulated._evidence_LEE, abs=unit)
    assert tables.prior_LE[1:].numpy() * unit == pytest.approx(simulated._prior_LE, abs=unit)
    assert tables.recent_LE.numpy() / 2**15 == pytest.approx(simulated._recent_LE, abs=1e-3)


def shared_out(demand_E):
    """The simulator may expect an expert more than once; here the others get the rest."""
    total, is_full = demand_E.sum(), np.zeros(demand_E.shape, dtype=bool)
    for _ in range(3):
        left = np.where(is_full, 0, demand_E)
        part = left * (total - is_full.sum()) / max(left.sum(), 1e-9)
        is_full |= part >= 1
    return np.where(is_full, 1, part)


def test_markov_predicts_what_the_simulator_predicts():
    trace = random_trace(4, tokens=100, layers=3, experts=16, top_k=3, skew=2.0)
    predictor, simulated = make("markov", trace), SimulatedMarkov(3, 16)
    for step in steps_of(trace):
        expected = simulated.predict(step)
        for layer in range(2):
            ids_TK = torch.from_numpy(step.ids_TLK[:, layer])
            found = demand_torch(ids_TK, predictor.tables, layer) / 4096
            if step.number:
                wanted = shared_out(expected[0, layer + 1])
                assert found.numpy() == pytest.approx(wanted, abs=0.02)
        predictor.learn(ids_of(step), 1)
        predictor.make_evidence()
        simulated.learn(step)
        simulated._refresh()


def test_markov_makes_its_table_seldom(monkeypatch):
    made = []
    monkeypatch.setattr(MarkovPredictor, "make_evidence", lambda self: made.append(self._steps))
    predictor = make("markov", random_trace(0))
    for _ in range(4 * REFRESH):
        predictor.refresh()
    assert made == [1, 2, 4, 8, 16, 32, 64, 128, 192, 256]


@pytest.mark.parametrize("is_first_idle", [False, True])
def test_markov_halves_its_counts_before_they_are_too_large(is_first_idle):
    """Tokens may choose none of a worker's experts in the first layer."""
    trace = random_trace(5, tokens=200, layers=3, experts=8)
    predictor = make("markov", trace)
    learn(predictor, trace)
    tables = predictor.tables
    factor = MOST_TOKENS // int(tables.tokens)  # just not enough
    counts = (tables.count_LEE, tables.use_LE, tables.tokens)
    for table in counts:
        table.mul_(factor)
    if is_first_idle:
        tables.tokens.zero_()
        tables.use_LE[0].zero_()
        tables.use_LE[1, 2] = MOST_TOKENS - 1
    before = [table.clone() for table in counts]
    predictor.make_evidence()
    assert all(torch.equal(*pair) for pair in zip(counts, before, strict=True))

    evidence_LEE, prior_LE = tables.evidence_LEE.clone(), tables.prior_LE.clone()
    (tables.use_LE[1, 2:3] if is_first_idle else tables.tokens).fill_(MOST_TOKENS)
    before = [table.clone() for table in counts]
    predictor.make_evidence()
    assert all(torch.equal(now, was >> 1) for now, was in zip(counts, before, strict=True))
    if not is_first_idle:
        is_seen_LEE = tables.count_LEE > 0
        assert int((tables.evidence_LEE - evidence_LEE)[is_seen_LEE].abs().max()) <= 1
        assert int((tables.prior_LE - prior_LE).abs().max()) <= 1


def test_eam_collects_windows_of_rows():
    trace = random_trace(1, tokens=3 * WINDOW, layers=2, sequences=1)
    predictor = make("eam", trace)
    learn(predictor, trace)
    predictor.settle()
    assert int(predictor.tables.size) == 3
    ids_TLK = trace.expert_ids.reshape(3, WINDOW, 2, 2)
    for number, window in enumerate(ids_TLK):
        counts_LE = predictor.tables.counts_LEN[:, :, number]
        for layer in range(2):
            expected = np.bincount(window[:, layer].ravel(), minlength=8)
            assert counts_LE[layer].tolist() == expected.tolist()
        norms = counts_LE.float().square().sum(1).cumsum(0).sqrt()
        torch.testing.assert_close(predictor.tables.inverse_norm_LN[:, number], 1 / norms)


def test_eam_leaves_out_rows_that_were_seldom_used_and_large_steps():
    predictor = EamPredictor(2, 8, 64, HOST)
    ids_LTK = torch.zeros(2, 64, 2, dtype=torch.int32)
    for step in range(WINDOW):
        predictor.learn(ids_LTK, 2 if step < WINDOW // 2 - 1 else 1)
        predictor.learn(ids_LTK, 33)
        predictor.refresh()
    predictor.settle()
    assert int(predictor.tables.size) == 1


def test_gate_asks_the_next_router():
    torch.manual_seed(0)
    weights = [torch.randn(8, 16) for _ in range(3)]
    routers = [lambda x_TH, w=w: x_TH @ w.T for w in weights]
    predictor = GatePredictor(routers, HOST)
    x_TH = torch.randn(5, 16)
    for layer in range(2):
        logits_TE = predictor.source(layer, x_TH).logits_TE
        torch.testing.assert_close(logits_TE, x_TH @ weights[layer + 1].T)
    # Where both layers see the same input, the K best are wanted most.
    ids_TK = weights[1].new_zeros(1, 3).long()
    demand_E = demand_torch(ids_TK, predictor.source(0, x_TH[:1]), 0)
    chosen = set((x_TH[:1] @ weights[1].T).topk(3).indices[0].tolist())
    assert set(demand_E.argsort(descending=True)[:3].tolist()) == chosen
    assert int((demand_E >= 2048).sum()) == 3


@pytest.mark.parametrize("name", ["markov", "eam"])
def test_what_was_learned_is_kept(name):
    trace = random_trace(2, tokens=3 * WINDOW)
    predictor, other = make(name, trace), make(name, trace)
    learn(predictor, trace)
    arrays = predictor.to_arrays()
    if name == "markov":
        predictor.make_evidence()
    other.from_arrays(arrays)
    for key, array in other.to_arrays().items():
        assert np.array_equal(array, arrays[key])
    x_TH = torch.empty(1, 0)
    for step in steps_of(trace):
        for layer in range(trace.num_layers - 1):
            ids_TK = torch.from_numpy(step.ids_TLK[:, layer])
            one, two = (demand_torch(ids_TK, p.source(layer, x_TH), layer)
                        for p in (predictor, other))  # fmt: skip
            if name == "eam":
                assert torch.equal(one, two)
        break
    if name == "markov":
        assert torch.equal(predictor.tables.evidence_LEE, other.tables.evidence_LEE)


@pytest.mark.parametrize("name", ["markov", "eam"])
def test_what_was_learned_can_be_forgotten(name):
    trace = random_trace(2, tokens=3 * WINDOW)
    predictor, fresh = make(name, trace), make(name, trace)
    learn(predictor, trace)
    predictor.forget()
    assert not any(array.any() for array in predictor.to_arrays().values())
    learn(predictor, trace)
    learn(fresh, trace)
    for key, array in fresh.to_arrays().items():
        assert np.array_equal(array, predictor.to_arrays()[key])


@pytest.mark.parametrize("name", ["markov", "eam"])
def test_damaged_or_foreign_arrays(name):
    trace = random_trace(2, tokens=2 * WINDOW)
    predictor = make(name, trace)
    learn(predictor, trace)
    good = predictor.to_arrays()
    (key, array), *_ = good.items()
    for bad in (None, array[..., :-1], array[0], array - 1 - array.max(), array.astype(float)):
        arrays = {**good, key: bad} if bad is not None else {}
        fresh = make(name, trace)
        with pytest.raises(OffloadError, match=key):
            fresh.from_arrays(arrays)
        assert not any(array.any() for array in fresh.to_arrays().values())


@pytest.mark.parametrize("name", ["markov", "eam"])
def test_planned_bytes_are_those_of_the_tables(name):
    trace = random_trace(0, layers=5, experts=48)
    tables = [t for t in vars(make(name, trace).tables).values() if 48 in t.shape]
    assert len(tables) > 0
    planned = table_bytes(name, trace.num_layers, trace.num_experts)
    assert planned == sum(table.nbytes for table in tables)


@pytest.mark.traces
@pytest.mark.parametrize(("name", "bar"), [("markov", 0.48), ("eam", 0.33)])
@pytest.mark.parametrize("tasks", [("intent", "summary"), ("summary", "intent")])
def test_recorded_tasks(name, bar, tasks):
    learned, tested = map(load, recorded(*(f"deepseek-v2-lite.{task}" for task in tasks)))
    predictor = make(name, tested)
    learn(predictor, learned)
    assert coverage(predictor, tested, learned.top_k, every=17) >= bar
