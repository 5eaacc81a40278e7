"""What the scheduler's half tells the workers' half, and what it hears back.

An order rides on the output of one ``schedule()`` to every worker. It is absolute: "from this
step on so many increments are the experts'". A worker carries it out before anything else of
that step, in the order of its compute stream: it empties closing slots, zeroes the bytes that
go back, opens new slots, then runs the step. That order alone makes a move safe:

- the schedule that takes increments back may hand their blocks to requests at once, because the
  step that writes them runs after the order that it carries;
- an increment may be lent as soon as its blocks are free in the scheduler's books, although an
  earlier step may still be writing them: that step runs before the order;
- both hold however many steps are in flight, and in each worker by itself, so it does not matter
  how far workers of one group are apart. Reports cannot carry this: vLLM answers from one worker
  of a group alone.

It is the rule by which vLLM itself reuses the blocks of a finished request while a step that
writes them is in flight. Copies beside the compute stream have to join it first.

A report rides back on the output of the model runner. It confirms, it carries what the
controller needs to know, and a worker that never confirms is found out.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum

from vllm_moe_offload.lending.boundary import Boundary

MAX_UNCONFIRMED = 256
"""Orders without a report after which the workers cannot be following. Pipelined steps leave a
dozen open at the worst."""


class ProtocolError(RuntimeError):
    """The two halves disagree; going on would let two tenants write one byte."""


class State(Enum):
    """Where an increment stands."""

    RETURNED = "vLLM's, and the workers have confirmed it"
    LENDING = "ordered to the experts, not yet confirmed"
    LENT = "the experts', confirmed"
    RECALLED = "ordered back to vLLM, not yet confirmed"


@dataclass(frozen=True)
class Order:
    """What holds from one step on."""

    number: int
    """1, 2, ... without a gap."""
    increments: int


@dataclass(frozen=True)
class Report:
    """What a worker has done and measured since it started."""

    number: int
    """Of the last order that was carried out, 0 for none."""
    increments: int
    miss_bytes: int = 0
    """Bytes of experts moved because no slot held them."""
    bytes_per_second: float = 0.0
    """Measured rate of such moves, 0 while unknown."""


class OrderBook:
    """The scheduler's side: gives orders, files reports."""

    def __init__(self) -> None:
        self.confirmed = Report(number=0, increments=0)
        self._last = Order(number=0, increments=0)
        self._unconfirmed: deque[Order] = deque()

    @property
    def ordered(self) -> int:
        """Increments that the last order gives to the experts."""
        return self._last.increments

    def order(self, increments: int) -> Order | None:
        """Order a number of increments from the coming step on; None if that holds already.

        Raises:
            ProtocolError: the workers have not confirmed anything for a long time.
        """
        if increments == self.ordered:
            return None
        if len(self._unconfirmed) >= MAX_UNCONFIRMED:
            raise ProtocolError(
                f"moe-offload: {MAX_UNCONFIRMED} moves of the KV cache's boundary, the last to "
                f"{self.ordered} slots a layer, were not confirmed by the workers. Install "
                "vllm-moe-offload in the workers' environment, or drop --plugin moe-offload."
            )
        self._last = Order(self._last.number + 1, increments)
        self._unconfirmed.append(self._last)
        return self._last

    def file(self, report: Report) -> None:
        """Take note of a report; one that comes late or twice changes nothing.

        Raises:
            ProtocolError: it confirms an order that was never given, or given otherwise.
        """
        if report.number < self.confirmed.number:
            return
        while self._unconfirmed and self._unconfirmed[0].number < report.number:
            self._unconfirmed.popleft()
        if report.number > self.confirmed.number:
            order = self._unconfirmed.popleft() if self._unconfirmed else None
            if order != Order(report.number, report.increments):
                raise ProtocolError(
                    f"moe-offload: a worker confirms {report}, but the scheduler ordered {order}. "
                    "Please report this; dropping --plugin moe-offload avoids it."
                )
        self.confirmed = report

    def state(self, increment: int) -> State:
        """Where an increment stands, counted from the top of the buffer."""
        history = [self.confirmed.increments, *(order.increments for order in self._unconfirmed)]
        moved = len({increment < increments for increments in history}) > 1
        if increment < self.ordered:
            return State.LENDING if moved else State.LENT
        return State.RECALLED if moved else State.RETURNED

    def check_integrity(self) -> None:
        """Raise unless the open orders follow one another without a gap."""
        numbers = [self.confirmed.number, *(order.number for order in self._unconfirmed)]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[-1] == self._last.number


@dataclass(frozen=True)
class Move:
    """What a worker does before a step, in this order."""

    first_open: int
    """Slots of every layer from here on are in use: ``Residencies.open_from``."""
    zeroed: range
    """Bytes of the buffer that vLLM gets back."""


class Follower:
    """A worker's side: turns orders into moves.

    Args:
        boundary: the same arithmetic as the scheduler's.
    """

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary
        self.number = 0
        self.increments = 0

    def follow(self, order: Order) -> Move:
        """Carry out the order of a step.

        Raises:
            ProtocolError: an order before this one was lost, or came twice.
        """
        if order.number != self.number + 1:
            raise ProtocolError(
                f"moe-offload: a worker got {order} after order {self.number}. Please report "
                "this; dropping --plugin moe-offload avoids it."
            )
        before, self.increments = self.increments, order.increments
        self.number = order.number
        back = self._boundary.blocks(min(before, self.increments), before)
        size = self._boundary.block_bytes
        return Move(
            first_open=self._boundary.slots(0, self.increments).start,
            zeroed=range(back.start * size, back.stop * size),
        )

    def report(self, miss_bytes: int = 0, bytes_per_second: float = 0.0) -> Report:
        """Say what was carried out, and what was measured since the start."""
        return Report(self.number, self.increments, miss_bytes, bytes_per_second)
