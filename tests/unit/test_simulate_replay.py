import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from slow_policies import (
    SlowAdaptive,
    SlowBelady,
    SlowLeastStale,
    SlowLfu,
    SlowLru,
    slow_admit,
    slow_replay,
)
from traces import random_trace, trace_of

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.predictors.collection import Collection
from vllm_moe_offload.simulate.policies import ALIAS, ENGINE_DEFAULT, POLICIES, make_policy
from vllm_moe_offload.simulate.predictors import Guesses
from vllm_moe_offload.simulate.replay import replay, slots_of
from vllm_moe_offload.simulate.steps import iterate, schedule
from vllm_moe_offload.trace import Trace

CACHES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)

small_traces = st.builds(
    random_trace,
    st.integers(0, 10_000),
    tokens=st.integers(1, 40),
    layers=st.integers(1, 4),
    experts=st.integers(4, 12),
    top_k=st.integers(1, 4),
    sequences=st.integers(1, 5),
    skew=st.sampled_from([0.0, 0.5, 2.0]),
)
batches = st.integers(1, 4)


def steps_of_layer(trace, batch, layer):
    return [trace.expert_ids[index][:, layer].tolist() for index in schedule(trace, batch)]


def slow_policy(name, trace, steps):
    if name == "belady":
        future = [{expert for ids in tokens for expert in ids} for tokens in steps]
        return SlowBelady(trace.num_experts, future)
    slow = {"lru": SlowLru, "lfu": SlowLfu, "least-stale": SlowLeastStale}[name]
    return slow(trace.num_experts)


@pytest.mark.parametrize("name", ["lru", "lfu", "least-stale", "belady"])
@given(trace=small_traces, batch=batches)
def test_against_brute_force(name, trace, batch):
    fast = replay(trace, name, CACHES, batch=batch)
    for place, cache in enumerate(CACHES):
        counts = np.zeros(2, int)
        for layer in range(trace.num_layers):
            steps = steps_of_layer(trace, batch, layer)
            slots = slots_of(trace, cache)
            counts += slow_replay(steps, slow_policy(name, trace, steps), slots)
        assert (fast.hits_C[place], fast.load_hits_C[place]) == tuple(counts)


@given(trace=small_traces, batch=batches)
def test_adaptive_against_brute_force(trace, batch):
    steps = [trace.expert_ids[index].astype(int) for index in schedule(trace, batch)]
    fast = replay(trace, "adaptive", CACHES, batch=batch)
    for place, cache in enumerate(CACHES):
        slow = SlowAdaptive(trace.num_layers, trace.num_experts, slots_of(trace, cache))
        assert fast.hits_C[place] == slow.replay(steps)


@given(trace=small_traces, batch=batches, seed=st.integers(0, 1000))
def test_adaptive_with_prefetch_against_brute_force(trace, batch, seed):
    steps = [trace.expert_ids[index].astype(int) for index in schedule(trace, batch)]
    guesses = Guesses(trace.num_layers, trace.num_experts)
    shape = (len(steps), trace.num_layers, trace.num_experts)
    guess_SLE = np.random.default_rng(seed).random(shape) < 0.1
    for guess_LE in guess_SLE:
        guesses.append(guess_LE)
    guessed = [[set(np.flatnonzero(guess_E).tolist()) for guess_E in step] for step in guess_SLE]
    fast = replay(trace, "adaptive", CACHES, batch=batch, guesses=guesses)
    for place, cache in enumerate(CACHES):
        slow = SlowAdaptive(trace.num_layers, trace.num_experts, slots_of(trace, cache))
        assert fast.hits_C[place] == slow.replay(steps, guessed)


@given(trace=small_traces, batch=batches)
def test_eam_against_brute_force(trace, batch):
    cache = 0.5
    slots = slots_of(trace, cache)
    past, counts, last = [], {}, {}
    resident = [set() for _ in range(trace.num_layers)]
    hits = 0
    for newest, step in enumerate(iterate(trace, schedule(trace, batch))):
        for ids_LK in step.ids_TLK:
            for layer, ids in enumerate(ids_LK):
                hits += sum(int(e) in resident[layer] for e in ids)
                last |= {(layer, int(e)): newest for e in ids}
        for layer in range(trace.num_layers):
            scores = {e: 1e-3 * (last.get((layer, e), -1) + 1) / (newest + 1)
                      for e in range(trace.num_experts)}  # fmt: skip
            for ids_LK in step.ids_TLK if past else ():
                best = max(past, key=lambda m: similarity(m, ids_LK[: layer + 1]))
                for e in scores:
                    scores[e] += best[layer, e] / max(1, best[layer].sum())
            active = set(step.ids_TLK[:, layer].ravel().tolist())
            resident[layer] = slow_admit(resident[layer], active, scores, slots)
        for sequence, ids_LK in zip(step.sequence_T.tolist(), step.ids_TLK, strict=True):
            shape = (trace.num_layers, trace.num_experts)
            matrix = counts.setdefault(sequence, np.zeros(shape))
            np.add.at(matrix, (np.arange(trace.num_layers)[:, None], ids_LK), 1)
        past += [counts.pop(sequence) for sequence in step.ended]
    assert replay(trace, "eam", [cache], batch=batch).hits_C[0] == hits


def similarity(matrix, ids_LK):
    seen = matrix[: len(ids_LK)]
    product = sum(matrix[layer, ids].sum() for layer, ids in enumerate(ids_LK))
    return product / max(np.sqrt((seen**2).sum()), 1e-9)


@pytest.mark.parametrize("policy", POLICIES)
@given(trace=small_traces, batch=batches)
def test_invariants(policy, trace, batch):
    result = replay(trace, policy, CACHES, batch=batch)
    bound = replay(trace, "belady", CACHES, batch=batch)
    assert result.accesses == trace.expert_ids.size
    assert (result.hits_C <= result.accesses).all()
    assert (result.load_hits_C <= result.loads).all()
    assert (result.load_hits_C <= bound.load_hits_C).all()
    assert result.hits_C[0] == 0, "a hit without slots"
    used = [{int(e) for e in trace.expert_ids[:, layer].ravel()}
            for layer in range(trace.num_layers)]  # fmt: skip
    cold = sum(len(experts) for experts in used)
    assert result.loads - result.load_hits_C[-1] == cold, "with all slots only first uses miss"
    if batch == 1:
        assert result.loads == result.accesses
        assert np.array_equal(result.load_hits_C, result.hits_C)


@given(trace=small_traces, batch=batches)
def test_lru_and_bound_grow_with_the_cache(trace, batch):
    for policy in ("lru", "belady") if batch == 1 else ("belady",):
        hits = replay(trace, policy, CACHES, batch=batch).load_hits_C
        fits = [cache == 0 or slots_of(trace, cache) >= trace.top_k for cache in CACHES]
        assert (np.diff(hits[fits]) >= 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_sizes_do_not_influence_each_other(policy):
    trace = random_trace(3, tokens=200, experts=16, top_k=3)
    together = replay(trace, policy, CACHES).hits_C.tolist()
    assert together == [int(replay(trace, policy, [cache]).hits_C[0]) for cache in CACHES]


def scores_of(policy, trace, tokens):
    steps, slots = schedule(trace, 1), np.array([4])
    ranking = make_policy(policy, trace, steps, slots)
    resident = np.zeros((1, trace.num_layers, trace.num_experts), bool)
    for step in iterate(trace, steps[:tokens]):
        resident, score = ranking.replace(step, resident, resident)
        yield score.copy()


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "belady"])
def test_the_future_is_not_used(policy):
    ids = random_trace(5, tokens=100).expert_ids
    one = trace_of(ids, 8, [20, 30, 50])
    other = trace_of(np.concatenate([ids[:50], ids[:50]]), 8, [20, 30, 50])
    pairs = zip(scores_of(policy, one, 50), scores_of(policy, other, 50), strict=True)
    assert all(np.array_equal(*pair) for pair in pairs)


def test_state_is_kept_across_sequences():
    ids = random_trace(0, tokens=30).expert_ids
    one, many = trace_of(ids, 8), trace_of(ids, 8, [10, 0, 15, 5])
    assert np.array_equal(replay(one, "lru", CACHES).hits_C, replay(many, "lru", CACHES).hits_C)


def test_a_token_is_resolved_at_once():
    # Two slots: both experts of the second token miss, though one of them comes with it.
    trace = trace_of([[[0, 1]], [[2, 0]], [[2, 0]]], 4)
    result = replay(trace, "lru", [0.5])
    assert result.hits_C.tolist() == [1 + 2]


def test_of_equally_old_experts_the_lower_goes_first():
    trace = trace_of([[[1, 0]], [[2, 3]], [[1, 2]]], 4)
    assert replay(trace, "lru", [0.75]).hits_C.tolist() == [2]


def test_default_is_a_policy():
    trace = random_trace(1, tokens=100)
    assert ENGINE_DEFAULT in POLICIES
    named, alias = (replay(trace, name, CACHES).hits_C for name in (ENGINE_DEFAULT, ALIAS))
    assert np.array_equal(named, alias)


def test_schedule_in_file_order():
    trace = trace_of(np.zeros((6, 1, 1)), 4, [2, 0, 3, 1])
    assert [index.tolist() for index in schedule(trace, 1)] == [[0], [1], [2], [3], [4], [5]]


def test_schedule_interleaves():
    trace = trace_of(np.zeros((9, 1, 1)), 4, [2, 4, 0, 1, 2])
    #             sequences a: 0 1, b: 2 3 4 5, c: 6, d: 7 8
    expected = [[0, 2], [1, 3], [4, 6], [5, 7], [8]]
    assert [index.tolist() for index in schedule(trace, 2)] == expected
    ended = [step.ended for step in iterate(trace, schedule(trace, 2))]
    assert ended == [(), (0,), (3,), (1,), (4,)]


@given(trace=small_traces, batch=batches)
def test_schedule_covers_every_token_once(trace, batch):
    steps = schedule(trace, batch)
    assert sorted(np.concatenate(steps).tolist()) == list(range(trace.num_tokens))
    assert max(len(index) for index in steps) <= batch
    sequences = trace.sequence_of_token()
    for index in steps:
        assert len(set(sequences[index].tolist())) == len(index)


def test_batch_by_unique_loads():
    # Both sequences read the expert 0, and one of them something else.
    trace = trace_of([[[0]], [[0]], [[0]], [[1]]], 4, [2, 2])
    result = replay(trace, "lru", [1.0], batch=2)
    assert (result.accesses, result.loads) == (4, 3)
    assert (result.hits_C.tolist(), result.load_hits_C.tolist()) == ([1], [1])
    assert result.hit_ratio(0) == 1 / 4
    assert result.load_hit_ratio(0) == 1 / 3
    assert result.moved(0) == 2


@pytest.mark.parametrize(("cache", "slots"), [(0.29, 29), (0.125, 12), (0, 0), (1, 100)])
def test_slots(cache, slots):
    assert slots_of(trace_of(np.zeros((1, 1, 1)), 100), cache) == slots


@pytest.mark.parametrize("cache", [-0.1, 1.1, float("nan")])
def test_no_share(cache):
    with pytest.raises(OffloadError, match="--cache"):
        slots_of(trace_of(np.zeros((1, 1, 1)), 4), cache)


def test_unknown_policy():
    with pytest.raises(OffloadError, match="Give lru, lfu"):
        replay(random_trace(0), "fifo", [0.5])


def test_empty_trace():
    result = replay(trace_of(np.zeros((0, 2, 1)), 4, []), "adaptive", CACHES)
    assert result.hit_ratio(0) == result.load_hit_ratio(0) == 0


def test_collection_replaces_the_most_similar():
    collection = Collection(1, 4, capacity=2)
    collection.add(np.array([[4.0, 0, 0, 0]]))
    collection.add(np.array([[0, 3.0, 1, 0]]))
    collection.add(np.array([[0, 1.0, 1, 0]]))
    kept = [collection.matrix(i).tolist() for i in range(2)]
    assert kept == [[[4, 0, 0, 0]], [[0, 1, 1, 0]]]
    assert collection.size == 2


def test_collection_matches_by_the_layers_passed():
    collection = Collection(2, 3, capacity=4)
    collection.add(np.array([[5.0, 1, 0], [9, 0, 0]]))
    collection.add(np.array([[1.0, 5, 0], [0, 9, 0]]))
    best = collection.match(np.array([[[0], [1]], [[1], [1]]]))
    assert best.tolist() == [[0, 1], [1, 1]]
    assert collection.rows(best, 0)[0] == pytest.approx(np.array([[5 / 6, 1 / 6, 0], [0, 1, 0]]))


@pytest.mark.parametrize("batch", [1, 3])
def test_lru_hits_are_those_of_the_engine(batch):
    """Hit for hit: the replay of a trace predicts what the kernels will count."""
    import torch

    from vllm_moe_offload.kernels.resolve import ResidencyTables, resolve_torch
    from vllm_moe_offload.residency import Residency

    random = np.random.default_rng(1)
    scores = random.gumbel(size=(120, 3, 16)) + np.log(1 / np.arange(1, 17))
    trace = Trace(
        expert_ids=np.argsort(-scores, axis=-1)[..., :4].astype(np.uint8),
        sequence_starts=np.array([0, 30, 75, 120], dtype=np.int64),
        num_experts=16,
        model="random",
        source="random",
    )
    replayed = replay(trace, "lru", [0.5], batch=batch)
    layers = [Residency(ResidencyTables.empty(16, 8, torch.device("cpu"))) for _ in range(3)]
    for step in iterate(trace, schedule(trace, batch)):
        for number, layer in enumerate(layers):
            ids_TK = torch.from_numpy(np.ascontiguousarray(step.ids_TLK[:, number])).long()
            resolve_torch(ids_TK, layer.tables, layer.work, evict=True)
    assert sum(layer.counts()["hits"] for layer in layers) == int(replayed.load_hits_C[0])
