"""The lender within the bounds of a step, over a pool of sets."""

from collections.abc import Sequence

import pytest

from vllm_moe_offload.lending import lender as module
from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.controller import FixedPolicy, Standing
from vllm_moe_offload.lending.lender import REACH, Lender
from vllm_moe_offload.lending.orders import Order, Report

PAGE = 4096
BOUNDARY = Boundary(
    num_blocks=101, block_bytes=PAGE, row_bytes=(4 * PAGE,), floor_blocks=21, most_slots=99,
    least_increments=2,
)  # fmt: skip


class SetPool:
    """A pool without a prefix cache."""

    def __init__(self) -> None:
        self.free = set(range(1, BOUNDARY.num_blocks))

    def free_among(self, ids: Sequence[int], limit: int) -> list[int]:
        return [id_ for id_ in ids if id_ in self.free][:limit]

    def take(self, ids: Sequence[int]) -> None:
        assert self.free >= set(ids)
        self.free -= set(ids)

    def give(self, ids: Sequence[int]) -> None:
        assert self.free.isdisjoint(ids)
        self.free |= set(ids)

    def standing(self, lent: int, run: Sequence[int]) -> Standing:
        return Standing(lent, 0, 0, 0)


class Yielding(FixedPolicy):
    gives_way = True

    def __init__(self, increments: int) -> None:
        super().__init__(increments)
        self.lacks = 0

    def lacked(self) -> None:
        self.lacks += 1


@pytest.fixture
def pool():
    return SetPool()


def lender_of(pool, policy, monkeypatch, *, back=3, taken=10) -> Lender:
    monkeypatch.setattr(module, "ZEROED_BYTES_PER_SECOND", back * 4 * PAGE / module.STALL_S)
    monkeypatch.setattr(module, "TAKEN_BLOCKS_PER_SECOND", taken / module.STALL_S)
    return Lender(BOUNDARY, pool, policy)


def test_lends_no_more_blocks_in_a_step_than_fit_into_a_stall(pool, monkeypatch):
    lender = lender_of(pool, FixedPolicy(BOUNDARY.max_increments), monkeypatch)
    lent = []
    for _ in range(10):
        before = len(pool.free)
        lender.step_begins()
        assert before - len(pool.free) <= 10
        lent.append(lender.ledger.lent)
        assert lender.ledger.num_withheld == 100 - len(pool.free)
    assert lent == [2, 5, 7, 10, 12, 15, 17, 20, 20, 20]


def test_takes_back_what_a_waiting_request_needs_over_some_steps(pool, monkeypatch):
    policy = Yielding(20)
    lender = lender_of(pool, policy, monkeypatch, taken=1000)
    lender.step_begins()
    assert lender.step_scheduled() == Order(1, 20)
    policy._increments = 20
    for expected in (17, 14):
        lender._back = 0
        for _ in range(3):
            assert lender.make_room(running=False)
        assert not lender.make_room(running=False)
        assert lender.ledger.lent == expected
    assert policy.lacks == 8
    assert lender.step_scheduled() == Order(2, 14)


def test_a_running_request_gets_all_but_the_least(pool, monkeypatch):
    lender = lender_of(pool, Yielding(20), monkeypatch, taken=1000)
    lender.step_begins()
    while lender.make_room(running=True):
        pass
    assert lender.ledger.lent == BOUNDARY.min_increments == 2
    assert len(pool.free) == 100 - 8


def test_the_policy_hears_of_a_request_that_there_is_nothing_for(pool, monkeypatch):
    """It would lend again what the request waits for, and the prefix cache would lose that."""
    policy = Yielding(BOUNDARY.min_increments)
    lender = lender_of(pool, policy, monkeypatch)
    lender.step_begins()
    assert not lender.make_room(running=False)
    assert policy.lacks == 1


def test_held_blocks_come_back_first_and_cost_nobody_a_slot(pool, monkeypatch):
    lender = lender_of(pool, Yielding(5), monkeypatch, taken=1000)
    busy = BOUNDARY.blocks(2, 3)[1]
    pool.free.discard(busy)
    lender.step_begins()
    assert lender.ledger.lent == 2
    assert len(lender.ledger.held) == 11
    lender._back = 3
    assert lender.make_room(running=False)
    assert (lender.ledger.lent, len(lender.ledger.held)) == (2, 0)
    assert not lender.make_room(running=False)


def test_waits_for_a_block_in_use(pool, monkeypatch):
    lender = lender_of(pool, FixedPolicy(3), monkeypatch)
    busy = BOUNDARY.num_blocks - 1
    pool.free.discard(busy)
    for _ in range(3):
        lender.step_begins()
        assert lender.step_scheduled() is None
    pool.free.add(busy)
    lender.step_begins()
    assert lender.step_scheduled() == Order(1, 3)
    lender.book.file(Report(1, 3))


def test_what_lies_far_below_a_block_in_use_stays_vllms(pool, monkeypatch):
    """The prefix cache would lose it for nothing."""
    lender = lender_of(pool, FixedPolicy(20), monkeypatch, taken=10)
    pool.free.discard(BOUNDARY.num_blocks - 1)
    for _ in range(9):
        lender.step_begins()
    assert len(lender.ledger.held) == REACH * 10 - 1
    assert lender.ledger.held == set(BOUNDARY.blocks(0, 5)) - {BOUNDARY.num_blocks - 1}
    pool.free.add(BOUNDARY.num_blocks - 1)
    for _ in range(9):
        lender.step_begins()
    assert lender.ledger.lent == 20


def test_a_step_that_may_take_less_than_an_increment_still_lends(pool, monkeypatch):
    lender = lender_of(pool, FixedPolicy(20), monkeypatch, taken=1)
    for _ in range(80):
        lender.step_begins()
    assert lender.ledger.lent == 20


def test_a_smaller_wish_gives_back_a_little_a_step(pool, monkeypatch):
    policy = Yielding(20)
    lender = lender_of(pool, policy, monkeypatch, taken=1000)
    lender.step_begins()
    policy._increments = 0
    lent = []
    for _ in range(7):
        lender.step_begins()
        lent.append(lender.ledger.lent)
    assert lent == [17, 14, 11, 8, 5, 2, 2]


def test_a_fixed_split_never_gives_way(pool, monkeypatch):
    lender = lender_of(pool, FixedPolicy(5), monkeypatch, taken=1000)
    lender.step_begins()
    assert not lender.make_room(running=True)
    assert lender.ledger.lent == 5


def test_a_wish_that_shrinks_returns_what_was_held_for_it(pool, monkeypatch):
    policy = Yielding(6)
    lender = lender_of(pool, policy, monkeypatch, taken=1000)
    pool.free.discard(BOUNDARY.num_blocks - 1)
    lender.step_begins()
    assert len(lender.ledger.held) == 23
    policy._increments = 3
    lender.step_begins()
    assert len(lender.ledger.held) == 11
    assert len(pool.free) == 99 - 11


def test_everything_opens_before_the_first_step(pool, monkeypatch):
    lender = lender_of(pool, Yielding(20), monkeypatch, taken=3)
    assert lender.opens() == Order(1, 20)
    assert lender.ledger.lent == 20
    assert lender.opens() is None


def test_what_is_never_handed_back_opens_in_any_case(pool, monkeypatch):
    lender = lender_of(pool, Yielding(0), monkeypatch, taken=3)
    assert lender.opens() == Order(1, BOUNDARY.min_increments)
