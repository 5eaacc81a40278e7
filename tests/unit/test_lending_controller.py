"""What the policy measures and how it decides, one cause at a time."""

from dataclasses import replace

import pytest

from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.controller import (
    INTERVAL_S,
    MEMORY_S,
    PEAK_S,
    REGRET_S,
    REST_S,
    STRIDE,
    AutoPolicy,
    FixedPolicy,
    Ghosts,
    PromptCost,
    Rate,
    Standing,
)

PAGE = 4096
BOUNDARY = Boundary(
    num_blocks=1001, block_bytes=PAGE, row_bytes=(8 * PAGE, 2 * PAGE), floor_blocks=101,
    most_slots=128, least_increments=3,
)  # fmt: skip
MOST = BOUNDARY.max_increments


def standing(lent: int, used: int = 0, cached: int = 0, in_run: int = 0) -> Standing:
    return Standing(lent, used, cached, in_run)


def policy_after(seconds: float, *, miss_bytes: int = 0, **looked_up: int) -> AutoPolicy:
    """A policy that has seen a second of steps after another, with prompts of two lengths."""
    policy = AutoPolicy(BOUNDARY)
    for number in range(int(seconds)):
        tokens = 1000 if number % 2 else 2000
        policy.step(tokens / 1500, tokens)
        policy.step(0.0, 0)
        policy.missed(miss_bytes, 50e9)
        policy.looked_up(**{"hit_tokens": 0, "lost_tokens": 0, "depth": 0, **looked_up})
    policy.step(INTERVAL_S, 1)
    return policy


def test_lends_all_that_nobody_needs():
    assert MOST == 90
    assert AutoPolicy(BOUNDARY).decide(standing(0)) == MOST


def test_leaves_requests_what_they_used_lately_and_an_increment():
    policy = AutoPolicy(BOUNDARY)
    wish = policy.decide(standing(0, used=500))
    assert BOUNDARY.first_block(wish) >= 1 + 500 + 10 > BOUNDARY.first_block(wish + 1)
    policy.step(PEAK_S / 2, 1)
    assert policy.decide(standing(wish, used=200)) == wish
    policy.step(PEAK_S, 1)
    assert policy.decide(standing(wish, used=200)) > wish


@pytest.mark.parametrize(("miss_bytes", "expected"), [(0, 10), (40 * 10**9, 10 + STRIDE)])
def test_weighs_misses_against_hits(miss_bytes, expected):
    policy = policy_after(20, miss_bytes=miss_bytes, hit_tokens=100)
    assert policy.decide(standing(10, cached=500, in_run=10)) == expected


def test_prefixes_that_nobody_asks_for_are_not_spared():
    assert policy_after(20).decide(standing(10, cached=500, in_run=10)) == MOST


def test_nothing_to_gain_where_every_expert_has_a_slot():
    boundary = Boundary(1001, PAGE, (PAGE,), 101, most_slots=20)
    policy = AutoPolicy(boundary)
    policy.missed(10**12, 50e9)
    assert policy.decide(standing(20, cached=500, in_run=1)) == 20


def test_gives_back_what_the_prefix_cache_has_lost_and_waits():
    policy = policy_after(20, lost_tokens=5000, depth=45)
    assert policy.decide(standing(50)) == 45
    policy.step(REGRET_S / 2, 1)
    assert policy.decide(standing(45)) == 45
    # What was dropped before is missed once more.
    policy.looked_up(0, 5000, 45)
    policy.step(INTERVAL_S, 1)
    assert policy.decide(standing(45)) == 45
    policy.step(REGRET_S, 1)
    assert policy.decide(standing(45)) == MOST


@pytest.mark.parametrize("back", [3, 5, 50])
def test_what_it_gives_back_takes_as_many_steps_as_it_needs(back):
    """A step may be longer than the interval, and a lender returns only a few in one."""
    policy = policy_after(20, lost_tokens=5000, depth=10 * back)
    policy._boundary = replace(BOUNDARY, least_increments=0)
    wish = policy.decide(standing(50))
    assert wish == 50 - back
    for lent in range(49, wish, -2):
        policy.step(INTERVAL_S * 2, 1)
        assert policy.decide(standing(lent)) == wish
    policy.step(INTERVAL_S * 2, 1)
    assert policy.decide(standing(wish)) == wish


def test_what_requests_lack_meanwhile_counts():
    policy = policy_after(20, lost_tokens=5000, depth=45)
    assert policy.decide(standing(50)) == 45
    policy.lacked()
    assert policy.decide(standing(48)) == 48


def test_slots_that_save_more_stay():
    policy = policy_after(20, lost_tokens=5, depth=45, miss_bytes=40 * 10**9)
    assert policy.decide(standing(50, cached=500, in_run=10)) >= 50


def test_keeps_the_least():
    policy = policy_after(20, lost_tokens=5000, depth=10_000)
    assert policy.decide(standing(5)) == BOUNDARY.min_increments == 3


def test_nothing_is_lent_while_a_request_waits():
    policy = AutoPolicy(BOUNDARY)
    for _ in range(10):
        policy.lacked()
        assert policy.decide(standing(3)) == 3
        policy.step(REST_S / 2, 1)
    policy.step(REST_S, 1)
    assert policy.decide(standing(3)) == MOST


def test_rests_after_requests_lacked_blocks():
    policy = AutoPolicy(BOUNDARY)
    assert policy.decide(standing(0)) == MOST
    policy.lacked()
    assert policy.decide(standing(40)) == 40
    policy.step(REST_S / 2, 1)
    assert policy.decide(standing(40)) == 40
    policy.step(REST_S, 1)
    assert policy.decide(standing(40)) == MOST


def test_decides_now_and_then():
    policy = AutoPolicy(BOUNDARY)
    policy.decide(standing(0))
    policy.looked_up(0, 10**9, 10)
    policy.missed(0, 0.0)
    policy.step(INTERVAL_S / 2, 5000)
    assert policy.decide(standing(MOST)) == MOST
    policy.step(INTERVAL_S, 5000)
    assert policy.decide(standing(MOST)) == MOST - 1


def test_fixed_split():
    policy = FixedPolicy(7)
    policy.step(1.0, 1)
    policy.missed(1, 1.0)
    policy.looked_up(1, 1, 1)
    policy.lacked()
    assert policy.decide(standing(0)) == 7
    assert not policy.gives_way


def test_rate():
    rate = Rate()
    assert rate.per_second(0.0) == 0.0
    for second in range(200):
        rate.add(second / 10, 3.0)
    assert rate.per_second(20.0) == pytest.approx(30.0, rel=0.05)
    assert rate.per_second(20.0 + MEMORY_S) == pytest.approx(30.0 / 2.718, rel=0.05)


def test_cost_of_a_token_is_not_that_of_the_stream():
    cost = PromptCost()
    assert cost.token_s() == 0.0
    cost.step(1.0 + 0.5, 5000)
    assert cost.token_s() == pytest.approx(1.5 / 5000)
    for tokens in (300, 8000, 1200, 4000, 7):
        cost.step(1.0 + tokens * 1e-4, tokens)
    assert cost.token_s() == pytest.approx(1e-4)
    for _ in range(200):
        cost.step(1.0, 8000)
        cost.step(1.0, 400)
    assert cost.token_s() == pytest.approx(0.0, abs=1e-6)


def test_ghosts():
    ghosts = Ghosts(3)
    for key in "abcd":
        ghosts.dropped(key)
    assert ghosts.wanted("abc") == (0, 0)
    assert ghosts.wanted("bcxd") == (2, 3)
    assert ghosts.wanted("bc") == (0, 0)
    ghosts.dropped("d")
    assert ghosts.wanted("d") == (1, 1)
    ghosts.dropped("e")
    ghosts.clear()
    assert ghosts.wanted("e") == (0, 0)
