import numpy as np
import pytest
from traces import random_trace

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.recorder.hot_set import HALF_LIFE, SAMPLE, HotSet


def counted_slowly(ids_TLK, layers, experts):
    score = np.zeros((layers, experts))
    for ids_LK in ids_TLK:
        score *= 0.5 ** (1 / HALF_LIFE)
        for layer, ids in enumerate(ids_LK):
            for expert in ids:
                if 0 <= expert < experts:
                    score[layer, expert] += 1
    return score


def test_counts():
    ids = random_trace(0, tokens=60).expert_ids.astype(np.int16)
    ids[3, 1, 0], ids[9, 2, 1] = -1, 8
    found = HotSet(3, 8)
    found.update(ids[:23])
    found.update(ids[23:])
    found.update(ids[:0])
    np.testing.assert_allclose(found.score_LE, counted_slowly(ids, 3, 8), rtol=1e-12)


@pytest.mark.parametrize("tokens", [SAMPLE + 1, 3 * SAMPLE, 10_000])
def test_a_sample_of_many_tokens_counts_like_all(tokens):
    random = np.random.default_rng(0)
    share = random.dirichlet(np.ones(8), size=2)
    ids = np.stack(
        [random.choice(8, size=(tokens, 1), p=share[layer]) for layer in range(2)], axis=1
    )
    found = HotSet(2, 8)
    found.update(ids.astype(np.int16))
    exact = counted_slowly(ids, 2, 8)
    assert found.score_LE.sum() == pytest.approx(exact.sum(), rel=0.01)
    error = found.score_LE / found.score_LE.sum() - exact / exact.sum()
    assert np.abs(error).max() < 3 / SAMPLE**0.5


def test_the_sample_reaches_to_the_last_token():
    ids = np.zeros((3 * SAMPLE, 1, 1), np.int16)
    ids[-1] = 1
    found = HotSet(1, 2)
    found.update(ids)
    assert found.score_LE[0, 1] == 3


def test_uses_fade_by_their_half_life():
    found = HotSet(1, 2)
    found.update(np.zeros((1, 1, 1), np.int16))
    for _ in range(HALF_LIFE // 64):
        found.update(np.ones((64, 1, 1), np.int16))
    assert found.score_LE[0, 0] == pytest.approx(0.5)


def test_goes_on_after_a_restart():
    ids = random_trace(1, tokens=60).expert_ids.astype(np.int16)
    whole, first, second = HotSet(3, 8), HotSet(3, 8), HotSet(3, 8)
    whole.update(ids)
    first.update(ids[:30])
    second.restore(first.section())
    second.update(ids[30:])
    np.testing.assert_allclose(second.score_LE, whole.score_LE, rtol=1e-6)


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"score_LE": np.zeros((3, 7), np.float32)},
        {"score_LE": np.zeros(24, np.float32)},
        {"score_LE": np.zeros((3, 8), np.int64)},
        {"score_LE": np.full((3, 8), "x")},
        {"score_LE": np.full((3, 8), np.nan, np.float32)},
        {"score_LE": np.full((3, 8), np.inf, np.float32)},
        {"score_LE": np.full((3, 8), -1, np.float32)},
    ],
    ids=["none", "experts", "flat", "integers", "text", "nan", "inf", "negative"],
)
def test_refuses_what_is_none(section):
    found = HotSet(3, 8)
    found.update(np.zeros((1, 3, 1), np.int16))
    before = found.score_LE.copy()
    with pytest.raises(OffloadError):
        found.restore(section)
    assert np.array_equal(found.score_LE, before)
