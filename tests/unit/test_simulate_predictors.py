import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import random_trace, recorded, trace_of

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.predictors import figures
from vllm_moe_offload.simulate.predictors import (
    EamPredictor,
    MarkovPredictor,
    best_guesses,
    make_predictor,
    observe,
)
from vllm_moe_offload.simulate.replay import replay
from vllm_moe_offload.simulate.steps import iterate, schedule
from vllm_moe_offload.trace import load

NAMES = ["markov", "eam"]
seeds = st.integers(0, 10_000)


def walk(trace, batch=1):
    return iterate(trace, schedule(trace, batch))


@given(seed=seeds, batch=st.integers(1, 3))
def test_markov_against_brute_force(seed, batch):
    trace = random_trace(seed, tokens=30, layers=4, experts=6)
    fast = MarkovPredictor(4, 6)
    pairs, uses, recent, tokens = {}, {}, {}, 0
    for step in walk(trace, batch):
        demand = fast.predict(step)
        for token, ids_LK in enumerate(step.ids_TLK) if tokens else ():
            for layer in range(1, 4):
                logits = [logit(e, layer, ids_LK, pairs, uses, recent, tokens) for e in range(6)]
                likelihood = np.exp(logits) / np.exp(logits).sum()
                assert demand[token, layer] == pytest.approx(2 * likelihood, rel=1e-3, abs=1e-6)
        assert not demand[:, 0].any()
        fast.learn(step)
        for ids_LK in step.ids_TLK.tolist():
            tokens += 1
            for layer, ids in enumerate(ids_LK):
                for expert in ids:
                    uses[layer, expert] = uses.get((layer, expert), 0) + 1
                    for follower in ids_LK[layer + 1] if layer < 3 else ():
                        key = layer, expert, follower
                        pairs[key] = pairs.get(key, 0) + 1
        for layer, expert in np.ndindex(4, 6):
            kept = figures.RECENT_FADE * recent.get((layer, expert), 0)
            recent[layer, expert] = kept + (1 - figures.RECENT_FADE) * step.active_LE[layer, expert]


def logit(expert, layer, ids_LK, pairs, uses, recent, tokens):
    prior = max(uses.get((layer, expert), 0) / tokens, 1e-4)
    value = figures.LIFETIME_WEIGHT * np.log(prior)
    floor = figures.RECENT_FLOOR
    value += figures.RECENT_WEIGHT * np.log(recent[layer, expert] + floor)
    for before in ids_LK[layer - 1].tolist():
        joint = pairs.get((layer - 1, before, expert), 0) + figures.SMOOTHING * prior
        given_before = joint / (uses.get((layer - 1, before), 0) + figures.SMOOTHING)
        value += np.log(given_before / prior)
    return value


@given(seed=seeds, window=st.sampled_from([None, 5]))
def test_eam_against_brute_force(seed, window):
    trace = random_trace(seed, tokens=40, layers=3, experts=6, sequences=5)
    fast = EamPredictor(3, 6, window=window)
    stored, matrix, counted = [], np.zeros((3, 6)), 0
    for step in walk(trace):
        demand = fast.predict(step)
        ids_LK = step.ids_TLK[0]
        for layer in range(1, 3) if stored else ():
            products = [sum(m[la, ids_LK[la]].sum() for la in range(layer)) for m in stored]
            norms = [np.sqrt((m[:layer] ** 2).sum()) for m in stored]
            cosines = np.array(products) / np.maximum(norms, 1e-9)
            rows = [m[layer] / m[layer].sum() for m in stored]
            best = [row for row, cosine in zip(rows, cosines, strict=True)
                    if cosine > cosines.max() - 1e-5]  # fmt: skip
            # Rounding may choose among equals.
            assert any(demand[0, layer] == pytest.approx(2 * row, abs=1e-5) for row in best)
        fast.learn(step)
        np.add.at(matrix, (np.arange(3)[:, None], ids_LK), 1)
        counted += 1
        if counted == window or (step.ended and counted):
            stored.append(matrix)
            matrix, counted = np.zeros((3, 6)), 0


@pytest.mark.parametrize("name", NAMES)
def test_only_layers_below_are_looked_at(name):
    trace = random_trace(0, tokens=60, layers=4)
    predictor = make_predictor(name, trace, [trace])
    (step,) = walk(trace_of(trace.expert_ids[:1], 8))
    (other,) = walk(trace_of(np.roll(trace.expert_ids[:1], 1, axis=1), 8))
    for layer in range(4):
        mixed = other.ids_TLK.copy()
        mixed[:, :layer] = step.ids_TLK[:, :layer]
        (step_of_both,) = walk(trace_of(mixed, 8))
        same, changed = predictor.predict(step), predictor.predict(step_of_both)
        assert np.array_equal(same[:, : layer + 1], changed[:, : layer + 1])


@pytest.mark.parametrize("name", NAMES)
def test_demand_sums_to_the_choices(name):
    trace = random_trace(0, tokens=60, layers=4)
    predictor = make_predictor(name, trace, [trace])
    for step in walk(trace, batch=3):
        demand = predictor.predict(step)
        assert demand.shape == (len(step.ids_TLK), 4, 8)
        assert not demand[:, 0].any()
        assert demand[:, 1:].sum(-1) == pytest.approx(np.full((len(demand), 3), 2.0), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_known_is_no_guess(name):
    trace = random_trace(0)
    predictor = make_predictor(name, trace, [])
    assert not predictor.predict(next(walk(trace))).any()


def test_certain_transitions_are_learned():
    random = np.random.default_rng(0)
    first = random.integers(0, 8, 400)
    after = random.permutation(8)
    trace = trace_of(np.stack([first, after[first], after[after[first]]], 1)[..., None], 8)
    found = observe(make_predictor("markov", trace, [trace]), trace)[0]
    assert found.coverage_2k >= found.coverage_k > 0.9
    assert found.precision == pytest.approx(found.coverage_k)
    assert found.wasted < 0.2


def test_accuracy_counts():
    class Constant:
        def predict(self, step):
            return np.array([[[0, 0, 0, 0], [3, 2, 1, 0.0]]])

        def learn(self, step):
            pass

    trace = trace_of([[[0, 1], [0, 2]], [[0, 1], [3, 2]]], 4)
    found = observe(Constant(), trace)[0]
    assert (found.coverage_k, found.coverage_2k) == (1 / 4, 3 / 4)
    assert (found.precision, found.wasted) == (1 / 4, 3 / 2)


def test_best_guesses():
    demand = np.array([[0.0, 3, 1, 2], [0, 0, 0, 1], [1, 1, 1, 1]])
    assert best_guesses(demand, 2).tolist() == [
        [False, True, False, True],
        [False, False, False, True],
        [True, True, False, False],
    ]
    assert best_guesses(demand, 9).sum() == 8


@given(st.integers(1, 9), st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_best_guesses_among_equals(count, demand):
    best = sorted(range(8), key=lambda expert: (-demand[expert], expert))[:count]
    expected = [expert in best and demand[expert] > 0 for expert in range(8)]
    assert best_guesses(np.array([demand], float), count).tolist() == [expected]


def test_single_layer():
    trace = random_trace(0, layers=1)
    for name in NAMES:
        assert observe(make_predictor(name, trace, [trace]), trace)[0].coverage_k == 0


def test_none():
    assert make_predictor("none", random_trace(0), []) is None


def test_gate_needs_the_engine():
    with pytest.raises(OffloadError, match="hidden states, which traces do not hold"):
        make_predictor("gate", random_trace(0), [])


def test_unknown():
    with pytest.raises(OffloadError, match="Give none, markov, eam"):
        make_predictor("oracle", random_trace(0), [])


class Oracle:
    def predict(self, step):
        demand = step.active_LE[None].astype(float)
        demand[:, 0] = 0
        return demand

    def learn(self, step):
        pass


class Liar(Oracle):
    def predict(self, step):
        demand = 1 - super().predict(step)
        demand[:, 0] = 0
        return demand


@pytest.mark.parametrize("policy", ["lru", "lfu", "eam", "least-stale", "adaptive"])
def test_perfect_prefetch_hits_everything_but_the_first_layer(policy):
    trace = random_trace(2, tokens=100, skew=0.3)
    plain = replay(trace, policy, [0.5])
    result = replay(trace, policy, [0.5], guesses=observe(Oracle(), trace, prefetch=2)[1])
    layer_0 = trace_of(trace.expert_ids[:, :1], 8)
    missed = layer_0.expert_ids.size - replay(layer_0, "lru", [0.5]).hits_C[0]
    assert result.accesses - result.hits_C[0] <= 2 * missed
    assert result.wasted_C.tolist() == [0]
    assert result.hits_C[0] > plain.hits_C[0]
    if policy != "adaptive":  # Its layers share what they learn.
        assert result.moved(0) <= 1.3 * plain.moved(0)


def test_useless_prefetch_is_all_waste():
    trace = random_trace(2, tokens=100)
    result = replay(trace, "lru", [0.5], guesses=observe(Liar(), trace, prefetch=2)[1])
    assert result.wasted_C[0] == result.fetched_C[0] > 0
    assert result.moved(0) == result.loads - result.load_hits_C[0] + result.fetched_C[0]
    assert result.hits_C[0] < replay(trace, "lru", [0.5]).hits_C[0]


@pytest.mark.traces
@pytest.mark.parametrize(("name", "bar"), [("markov", 0.48), ("eam", 0.33)])
@pytest.mark.parametrize("tasks", [("intent", "summary"), ("summary", "intent")])
def test_recorded_tasks(name, bar, tasks):
    learned, tested = map(load, recorded(*(f"deepseek-v2-lite.{task}" for task in tasks)))
    found = observe(make_predictor(name, tested, [learned]), tested)[0]
    assert found.coverage_k >= bar
    assert found.coverage_2k > found.coverage_k + 0.1
