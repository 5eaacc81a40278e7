"""Orders and reports, with steps in flight, workers apart, reports late and processes killed."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_moe_offload.lending import orders
from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.orders import (
    Follower,
    Move,
    Order,
    OrderBook,
    ProtocolError,
    Report,
    State,
)

PAGE = 4096
BOUNDARY = Boundary(
    num_blocks=24, block_bytes=PAGE, row_bytes=(PAGE, 2 * PAGE), floor_blocks=6, most_slots=9
)
WORKERS = 2
DEPTH = 3  # steps that may be in flight

ZERO, KV, WEIGHTS = "zero", "kv", "weights"


@dataclass(frozen=True)
class Step:
    """What one output of the scheduler makes a worker do."""

    order: Order | None
    kv_blocks: frozenset[int]


class Worker:
    """A worker's buffer as the tenant of every block, in the order of its stream."""

    def __init__(self) -> None:
        self.follower = Follower(BOUNDARY)
        self.buffer = [ZERO] * BOUNDARY.num_blocks
        self.first_open = BOUNDARY.max_increments

    def run(self, step: Step) -> Report:
        if step.order is not None:
            move = self.follower.follow(step.order)
            self.first_open = move.first_open
            for byte in range(move.zeroed.start, move.zeroed.stop, PAGE):
                assert self.buffer[byte // PAGE] in (WEIGHTS, ZERO, KV)
                self.buffer[byte // PAGE] = ZERO
        for slot in range(self.first_open, BOUNDARY.max_increments):
            for layer in range(2):
                self.buffer[BOUNDARY.row_offset(layer, slot) // PAGE] = WEIGHTS
        for block in step.kv_blocks:
            assert self.buffer[block] != WEIGHTS, "attention would read weights"
            self.buffer[block] = KV
        return self.follower.report()


class ProtocolMachine(RuleBasedStateMachine):
    """A scheduler, its workers, and steps under way between them."""

    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        self.book = OrderBook()
        self.workers = [Worker() for _ in range(WORKERS)]
        self.steps: list[Step] = []
        self.done = [0] * WORKERS
        self.reports: list[Report] = []
        self.filed = 0
        self.lent = 0
        self.used: frozenset[int] = frozenset()

    @precondition(lambda self: len(self.steps) - self.filed < DEPTH)
    @rule(lent=st.integers(0, BOUNDARY.max_increments), seed=st.randoms(use_true_random=False))
    def schedule(self, lent, seed):
        """Move the boundary, then use any blocks below it at once."""
        self.used = frozenset(b for b in self.used if seed.random() < 0.7)
        in_the_way = [b for b in self.used if b >= BOUNDARY.first_block(lent)]
        self.lent = self.lent if in_the_way else lent
        free = range(1, BOUNDARY.first_block(self.lent))
        self.used |= frozenset(b for b in free if seed.random() < 0.3)
        self.steps.append(Step(self.book.order(self.lent), self.used))

    @precondition(lambda self: min(self.done) < len(self.steps))
    @rule(worker=st.integers(0, WORKERS - 1))
    def run_step(self, worker):
        """Each worker runs the steps in order, in its own time; the first one answers."""
        if self.done[worker] < len(self.steps):
            report = self.workers[worker].run(self.steps[self.done[worker]])
            self.done[worker] += 1
            if worker == 0:
                self.reports.append(report)

    @precondition(lambda self: self.filed < len(self.reports))
    @rule(late=st.booleans())
    def file_report(self, late):
        """Outputs are processed in order; an old report turns up again at times."""
        self.book.file(self.reports[self.filed])
        if late:
            confirmed = self.book.confirmed
            self.book.file(self.reports[self.filed // 2])
            assert self.book.confirmed == confirmed
        self.filed += 1

    @rule()
    def kill(self):
        """A new process starts from nothing lent."""
        self.start()
        assert {self.book.state(i) for i in range(BOUNDARY.max_increments)} <= {State.RETURNED}

    @invariant()
    def books_agree(self):
        self.book.check_integrity()
        assert self.book.ordered == self.lent
        for increment in range(BOUNDARY.max_increments):
            state = self.book.state(increment)
            assert (state in (State.LENDING, State.LENT)) == (increment < self.lent)
        if self.filed == len(self.steps):
            assert self.book.confirmed.increments == self.lent
            assert all(
                self.book.state(i) in (State.LENT, State.RETURNED)
                for i in range(BOUNDARY.max_increments)
            )


TestProtocol = ProtocolMachine.TestCase
TestProtocol.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_life_of_an_increment():
    book = OrderBook()
    assert book.state(0) is State.RETURNED
    assert book.order(2) == Order(1, 2)
    assert [book.state(i) for i in range(3)] == [State.LENDING, State.LENDING, State.RETURNED]
    book.file(Report(1, 2))
    assert book.state(1) is State.LENT
    assert book.order(1) == Order(2, 1)
    assert book.state(0) is State.LENT
    assert book.state(1) is State.RECALLED
    # Lent again before the workers have confirmed that it came back.
    assert book.order(2) == Order(3, 2)
    assert book.state(1) is State.LENDING
    book.file(Report(2, 1))
    assert book.state(1) is State.LENDING
    book.file(Report(3, 2))
    assert book.state(1) is State.LENT


def test_no_order_without_a_change():
    book = OrderBook()
    assert book.order(0) is None
    assert book.order(3) == Order(1, 3)
    assert book.order(3) is None


def test_moves():
    boundary = BOUNDARY
    follower = Follower(boundary)
    top = boundary.max_increments
    move = follower.follow(Order(1, 3))
    assert (move.first_open, len(move.zeroed)) == (top - 3, 0)
    assert follower.follow(Order(2, 1)) == Move(
        top - 1, range(boundary.first_block(3) * PAGE, boundary.first_block(1) * PAGE)
    )
    assert follower.report(7, 2.0) == Report(2, 1, 7, 2.0)


def test_a_lost_order_is_found_out():
    follower = Follower(BOUNDARY)
    follower.follow(Order(1, 1))
    with pytest.raises(ProtocolError, match="after order 1"):
        follower.follow(Order(3, 2))
    with pytest.raises(ProtocolError, match="after order 1"):
        follower.follow(Order(1, 1))


@pytest.mark.parametrize("report", [Report(1, 1), Report(2, 2), Report(3, 1)])
def test_a_report_of_something_else_is_found_out(report):
    book = OrderBook()
    book.order(2)
    book.order(1)
    with pytest.raises(ProtocolError, match="confirms"):
        book.file(report)


def test_reports_may_skip_orders():
    book = OrderBook()
    for increments in (2, 1, 3):
        book.order(increments)
    book.file(Report(2, 1))
    assert book.state(0) is State.LENT
    assert book.state(2) is State.LENDING
    book.file(Report(1, 2))
    assert book.confirmed == Report(2, 1)
    book.check_integrity()


def test_workers_that_do_not_follow_are_found_out():
    book = OrderBook()
    for number in range(orders.MAX_UNCONFIRMED):
        book.order(1 + number % 2)
    with pytest.raises(ProtocolError, match="not confirmed by the workers"):
        book.order(3)
