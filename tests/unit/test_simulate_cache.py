import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from slow_policies import slow_admit

from vllm_moe_offload.simulate.cache import admit


@st.composite
def rules(draw, experts, layers):
    """Bypass, and scores of the layers by which missing experts compete."""
    values = st.lists(st.integers(0, 4), min_size=experts, max_size=experts)
    entry = draw(st.none() | st.lists(values, min_size=layers, max_size=layers))
    return draw(st.booleans()), entry


@st.composite
def situations(draw):
    experts = draw(st.integers(1, 9))
    slots = draw(st.integers(0, experts))
    pick = st.sets(st.integers(0, experts - 1))
    layers = draw(st.integers(1, 3))
    resident = [sorted(draw(pick))[:slots] for _ in range(layers)]
    active = [draw(pick) for _ in range(layers)]
    scores = [draw(st.lists(st.integers(0, 4), min_size=experts, max_size=experts))
              for _ in range(layers)]  # fmt: skip
    return experts, slots, resident, active, np.array(scores, float), draw(rules(experts, layers))


def mask(rows, experts):
    return np.array([[expert in row for expert in range(experts)] for row in rows])


@given(situations())
def test_against_brute_force(situation):
    experts, slots, resident, active, scores, (bypass, entry) = situation
    before = mask(resident, experts)[None]
    entry_LE = None if entry is None else np.array(entry)
    after = admit(
        before, mask(active, experts), scores, np.array([slots]), entry_LE=entry_LE, bypass=bypass
    )
    for layer in range(len(active)):
        expected = slow_admit(
            set(resident[layer]), set(active[layer]), scores[layer], slots, bypass,
            None if entry is None else entry[layer],
        )  # fmt: skip
        assert set(np.flatnonzero(after[0, layer]).tolist()) == expected
    assert np.array_equal(before, mask(resident, experts)[None]), "the argument was changed"


@given(situations())
def test_invariants(situation):
    experts, slots, resident, active, scores, _ = situation
    before, wanted = mask(resident, experts)[None], mask(active, experts)
    after = admit(before, wanted, scores, np.array([slots]))
    assert (after.sum(-1) <= slots).all()
    assert (after >= (before & wanted)).all(), "an expert that is read was evicted"
    assert (after <= (before | wanted)).all(), "somebody came unasked"
    assert (after.sum(-1) >= before.sum(-1)).all(), "a slot was emptied"


def test_sizes_side_by_side():
    random = np.random.default_rng(0)
    slots = np.array([1, 3, 6])
    together = np.zeros((3, 2, 8), bool)
    apart = [np.zeros((1, 2, 8), bool) for _ in slots]
    for _ in range(30):
        active, scores = random.random((2, 8)) < 0.3, random.random((2, 8))
        together = admit(together, active, scores, slots)
        apart = [admit(each, active, scores, slots[i : i + 1]) for i, each in enumerate(apart)]
        assert np.array_equal(together, np.concatenate(apart))


def test_scores_a_size():
    resident = np.ones((2, 1, 2), bool)
    scores = np.array([[[1.0, 2.0, 0.0]], [[2.0, 1.0, 0.0]]])
    resident = np.concatenate([resident, np.zeros((2, 1, 1), bool)], -1)
    after = admit(resident, np.array([[False, False, True]]), scores, np.array([2, 2]))
    assert after.tolist() == [[[False, True, True]], [[True, False, True]]]
