"""The scheduler's half: takes blocks out of vLLM's pool for experts and puts them back."""

from collections.abc import Sequence
from typing import Protocol

from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.controller import Policy, Standing
from vllm_moe_offload.lending.ledger import Ledger
from vllm_moe_offload.lending.orders import Order, OrderBook

STALL_S = 0.005
"""Longest that a move may hold up a step."""

ZEROED_BYTES_PER_SECOND = 400e9
"""Rate at which bytes are zeroed on the slowest GPUs at hand; measured ones do several times as
much."""

TAKEN_BLOCKS_PER_SECOND = 400_000
"""Rate at which the pool's linked list and hash map let go of blocks, in plain Python."""

REACH = 2
"""Blocks that are wished for, in those that a step may take. A block in use holds up whatever lies
below it, and the prefix cache would lose that for nothing."""

WINDOW_BLOCKS = 64
"""Coldest free blocks among which the lowest are used first, and never fewer than four times as
many as are needed. Requests settle low in the buffer and stay out of the way of lending, and the
prefix cache still loses what is old."""


def window(num_blocks: int) -> int:
    """Free blocks to choose ``num_blocks`` from."""
    return max(WINDOW_BLOCKS, 4 * num_blocks)


class Pool(Protocol):
    """vLLM's block pool, as far as lending needs it."""

    def free_among(self, ids: Sequence[int], limit: int) -> list[int]:
        """Up to ``limit`` of the ids that no request holds, the coldest of them first."""

    def take(self, ids: Sequence[int]) -> None:
        """Withhold free blocks, and drop what the prefix cache has in them."""

    def give(self, ids: Sequence[int]) -> None:
        """Put withheld blocks back, the lowest to be used first."""

    def standing(self, lent: int, run: Sequence[int]) -> Standing:
        """Count blocks; ``run`` are the ids in the way of the next increments."""


class Lender:
    """Follows a policy within the bounds of a step, and gives way to requests.

    Args:
        boundary: the arithmetic.
        pool: the scheduler's blocks.
        policy: where the boundary should be.
    """

    def __init__(self, boundary: Boundary, pool: Pool, policy: Policy) -> None:
        self.boundary = boundary
        self.ledger = Ledger(boundary)
        self.book = OrderBook()
        self._pool = pool
        self._policy = policy
        back = int(STALL_S * ZEROED_BYTES_PER_SECOND) // boundary.increment_bytes
        self._back_a_step = max(1, back)
        self._taken_a_step = int(STALL_S * TAKEN_BLOCKS_PER_SECOND)
        reach = REACH * self._taken_a_step * boundary.block_bytes
        self._reach = max(1, reach // boundary.increment_bytes)
        self._back = 0

    def opens(self) -> Order | None:
        """Move the boundary to where the policy wants it before the first step.

        Nothing is in use yet and nobody waits, so it goes all the way; what experts never hand
        back is lent in any case.

        Returns:
            What the workers have to be told before that step.
        """
        withheld = -1
        while withheld < self.ledger.num_withheld:
            withheld = self.ledger.num_withheld
            self.step_begins()
        assert self.ledger.lent >= self._least, "blocks are in use before the first step"
        return self.step_scheduled()

    def step_begins(self) -> None:
        """Move the boundary towards where the policy wants it, before requests are scheduled."""
        self._back = 0
        ledger = self.ledger
        run = self.boundary.blocks(ledger.lent, min(ledger.lent + 1, self._most))
        wish = self._policy.decide(self._pool.standing(ledger.lent, run))
        wish = min(max(wish, self._least), self._most, ledger.lent + self._reach)
        if wish < ledger.lent:
            self._recall(max(wish, ledger.lent - self._back_a_step))
            return
        if stray := ledger.wish(wish):
            self._pool.give(stray)
        if missing := ledger.missing():
            ids = self._pool.free_among(missing, self._taken_a_step)
            ledger.hold(ids)
            self._pool.take(ids)
            ledger.advance()

    def make_room(self, *, running: bool) -> bool:
        """Give one increment back, because a request cannot get its blocks.

        Args:
            running: whether the request is running, and would be preempted. A waiting one gets
                no more in one step than can be zeroed unnoticed, and the rest in the next.

        Returns:
            Whether there are more free blocks now.
        """
        if not self._policy.gives_way:
            return False
        self._policy.lacked()
        held = bool(self.ledger.held)
        at_least = self.ledger.lent <= self._least
        exhausted = not running and self._back >= self._back_a_step
        if not held and (at_least or exhausted):
            return False
        self._recall(self.ledger.lent - (0 if held else 1))
        return True

    def step_scheduled(self) -> Order | None:
        """Return what the workers have to be told with this step, if anything has changed."""
        return self.book.order(self.ledger.lent)

    def _recall(self, increments: int) -> None:
        self._back += self.ledger.lent - increments
        self._pool.give(self.ledger.recall(increments))

    @property
    def _most(self) -> int:
        return self.boundary.max_increments

    @property
    def _least(self) -> int:
        return self.boundary.min_increments
