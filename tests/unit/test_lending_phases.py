"""The policy against every fixed split, in the time of a cost model (``tests/support/phases.py``).

A card of 24 GB that serves a model of the shape of Qwen3-30B-A3B up to 100k tokens: 13,600 blocks
are left for KV cache and experts.
"""

from functools import cache

import pytest
from phases import Server, boundary_for, burst, chat, crowd, document

from vllm_moe_offload.lending.controller import AutoPolicy, FixedPolicy, Policy
from vllm_moe_offload.lending.lender import STALL_S

BOUNDARY = boundary_for(num_blocks=13_600, max_model_len=102_400)
SPLITS = range(0, BOUNDARY.max_increments + 1, 4)
ROUNDS = 2


@cache
def phases(policy: Policy) -> tuple[float, ...]:
    """What one chat user, 64 concurrent prompts of 4k and a document of 100k take, twice."""
    server = Server(BOUNDARY, policy)
    seconds = []
    for number in range(0, 3000 * ROUNDS, 3000):
        seconds.append(sum(server.serve([turn]) for turn in chat(number)))
        seconds.append(server.serve(burst(number + 1000), concurrency=64))
        seconds.append(server.serve(document(number + 2000)))
    assert server.longest_move_s <= STALL_S
    return tuple(seconds)


@pytest.fixture(scope="module")
def fixed() -> dict[int, tuple[float, ...]]:
    return {increments: phases(FixedPolicy(increments)) for increments in SPLITS}


def test_phases_want_different_splits(fixed):
    best = [min(SPLITS, key=lambda k: fixed[k][phase]) for phase in range(3)]
    assert best[0] == best[2] == SPLITS[-1]
    assert best[1] < SPLITS[-1] // 2


def test_close_to_the_best_split_of_each_phase(fixed):
    best = sum(min(times[phase] for times in fixed.values()) for phase in range(3 * ROUNDS))
    assert sum(phases(AutoPolicy(BOUNDARY))) <= 1.05 * best


def test_better_than_every_split(fixed):
    auto = sum(phases(AutoPolicy(BOUNDARY)))
    assert all(auto < sum(times) for times in fixed.values())


def test_from_idle_to_the_whole_cache_in_a_few_steps():
    server = Server(BOUNDARY, AutoPolicy(BOUNDARY))
    for turn in chat(0, turns=2):
        server.serve([turn])
    assert server.lender.ledger.lent == BOUNDARY.max_increments
    server.waiting.extend(burst(1000, users=64))
    start, steps = server.now, 0
    while server.lender.ledger.lent:
        server.step()
        steps += 1
        assert steps < 60
    # By then the requests hold all blocks that they could have had without experts.
    assert len(server.blocks.free) < 64 * 4096 // 16 // len(server.running)
    at_once = Server(BOUNDARY, FixedPolicy(0))
    at_once.waiting.extend(burst(1000, users=64))
    while len(at_once.running) < len(server.running):
        at_once.step()
    assert server.now - start <= 1.05 * at_once.now
    assert server.preemptions <= at_once.preemptions


@pytest.mark.parametrize("most_of", ["slots", "prefixes"])
def test_a_crowd_whose_prefixes_fit_only_without_slots(most_of):
    # A prompt's token costs next to nothing beside a stream of experts, or thirty times as much.
    cost = 0.03e-3 if most_of == "slots" else 1e-3

    def seconds(policy: Policy) -> float:
        server = Server(BOUNDARY, policy, prompt_token_s=cost)
        for turn in chat(0):
            server.serve([turn])
        return server.serve(crowd(1000), concurrency=1)

    auto = seconds(AutoPolicy(BOUNDARY))
    all_lent, none_lent = seconds(FixedPolicy(BOUNDARY.max_increments)), seconds(FixedPolicy(0))
    if most_of == "slots":
        assert all_lent < none_lent
        assert auto < 1.1 * all_lent
    else:
        assert none_lent < all_lent
        assert auto < 0.9 * all_lent
