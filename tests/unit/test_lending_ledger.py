"""The ledger against a model that knows the tenant of every block."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.ledger import Ledger

PAGE = 4096
BOUNDARY = Boundary(
    num_blocks=40, block_bytes=5000, row_bytes=(PAGE, 2 * PAGE), floor_blocks=9, most_slots=20
)


class LedgerMachine(RuleBasedStateMachine):
    """vLLM uses and frees blocks while the boundary is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(BOUNDARY)
        self.free = set(range(1, BOUNDARY.num_blocks))
        self.used: set[int] = set()
        self.withheld: set[int] = set()

    def give(self, ids: list[int]) -> None:
        assert ids == sorted(set(ids))
        assert set(ids) <= self.withheld
        self.withheld -= set(ids)
        self.free |= set(ids)

    @rule(count=st.integers(1, 12), seed=st.integers(0, 99))
    def use(self, count, seed):
        ids = random.Random(seed).sample(sorted(self.free), min(count, len(self.free)))
        self.free -= set(ids)
        self.used |= set(ids)

    @rule(count=st.integers(1, 20), seed=st.integers(0, 99))
    def stop_using(self, count, seed):
        ids = random.Random(seed).sample(sorted(self.used), min(count, len(self.used)))
        self.used -= set(ids)
        self.free |= set(ids)

    @rule(increments=st.integers(0, BOUNDARY.max_increments))
    def wish(self, increments):
        self.give(self.ledger.wish(increments))
        assert self.ledger.wished == max(increments, self.ledger.lent)

    @rule(limit=st.integers(1, 30))
    def hold(self, limit):
        ids = [id_ for id_ in self.ledger.missing() if id_ in self.free][:limit]
        self.ledger.hold(ids)
        self.free -= set(ids)
        self.withheld |= set(ids)

    @rule()
    def advance(self):
        before = self.ledger.lent
        assert self.ledger.advance() == self.ledger.lent - before
        if self.ledger.lent < self.ledger.wished:
            run = BOUNDARY.blocks(self.ledger.lent, self.ledger.lent + 1)
            assert set(run) & (self.used | self.free)

    @precondition(lambda self: self.ledger.lent or self.ledger.held)
    @rule(data=st.data())
    def recall(self, data):
        increments = data.draw(st.integers(0, self.ledger.lent))
        self.give(self.ledger.recall(increments))
        assert self.ledger.lent == increments
        assert not self.ledger.held

    @invariant()
    def every_block_has_one_tenant(self):
        self.ledger.check_integrity()
        lent = set(BOUNDARY.blocks(0, self.ledger.lent))
        assert lent | self.ledger.held == self.withheld
        assert self.ledger.num_withheld == len(self.withheld)
        everyone = [self.free, self.used, self.withheld]
        assert sum(map(len, everyone)) == BOUNDARY.num_blocks - 1
        assert set().union(*everyone) == set(range(1, BOUNDARY.num_blocks))


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_block_in_use_is_waited_for_and_its_neighbours_are_held():
    ledger = Ledger(BOUNDARY)
    ledger.wish(2)
    missing = ledger.missing()
    assert missing == list(reversed(BOUNDARY.blocks(0, 2)))
    (busy, *others) = missing
    ledger.hold(others)
    assert ledger.advance() == 0
    assert ledger.missing() == [busy]
    ledger.hold([busy])
    assert ledger.advance() == 2
    assert ledger.held == set()


def test_blocks_are_not_taken_unasked():
    ledger = Ledger(BOUNDARY)
    ledger.wish(1)
    with pytest.raises(AssertionError, match="nobody wished for"):
        ledger.hold([BOUNDARY.first_block(1) - 1])
    ledger.hold([39])
    with pytest.raises(AssertionError, match="twice"):
        ledger.hold([39])
