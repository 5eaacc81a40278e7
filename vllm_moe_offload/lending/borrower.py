"""The workers' half: carries out orders on a worker's slots, in the order of its compute stream."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.orders import Follower, Order, Report
from vllm_moe_offload.residencies import Residencies


class Traffic(Protocol):
    """What was measured of moving experts to the device."""

    bytes_per_second: float
    """Rate of such moves, 0 while unknown."""

    def num_bytes(self) -> int:
        """Bytes moved since the start, as far as known without waiting for the device."""


class Borrower:
    """Opens and closes the slots of all layers, and zeroes what goes back.

    The increments that are never handed back are open from the start: graphs count on them.

    Args:
        boundary: where slots lie in the buffer.
        buffer: the KV cache's, one-dimensional, of any one-byte type; zeros.
        residencies: of all layers, each with as many slots as can ever be borrowed.
        traffic: what is moved into these slots.
        settle: lets the compute stream wait for what goes on beside it, and forgets plans that
            were made for the slots as they are.
    """

    def __init__(
        self,
        boundary: Boundary,
        buffer: Tensor,
        residencies: Residencies,
        traffic: Traffic,
        settle: Callable[[], None],
    ) -> None:
        self.boundary = boundary
        self._bytes = buffer.view(torch.uint8)
        self._residencies = residencies
        self._traffic = traffic
        self._settle = settle
        self._follower = Follower(boundary)
        self._residencies.open_from(self._first_open)

    @property
    def increments(self) -> int:
        """Slots of every layer that are open."""
        return max(self._follower.increments, self.boundary.min_increments)

    @property
    def first_block(self) -> int:
        """First block of the buffer that holds slots that are open."""
        return self.boundary.first_block(self.increments)

    @property
    def lent_bytes(self) -> int:
        """Bytes of the slots that are open, all layers together."""
        return self.increments * self.boundary.increment_bytes

    def follow(self, order: Order) -> None:
        """Carry out the order of a step before anything else of the step is queued.

        Raises:
            ProtocolError: an order before this one was lost, or came twice.
        """
        assert order.increments >= self.boundary.min_increments, f"{order} is below the least"
        move = self._follower.follow(order)
        self._settle()
        self._residencies.open_from(move.first_open)
        self._bytes[move.zeroed.start : move.zeroed.stop].zero_()

    def empty(self) -> None:
        """Let no slot hold anything, because the buffer's content is about to be discarded."""
        self._settle()
        self._residencies.empty()

    def report(self) -> Report:
        """Say what was carried out and measured; never waits for the device."""
        return self._follower.report(self._traffic.num_bytes(), self._traffic.bytes_per_second)

    def check_integrity(self) -> None:
        """Raise unless every layer uses the slots above the boundary and no other."""
        for residency in self._residencies:
            assert residency.num_slots == self.boundary.max_increments
            assert residency.first_open == self._first_open, "a layer has another boundary"
        self._residencies.check_integrity()

    @property
    def _first_open(self) -> int:
        return self.boundary.slots(0, self.increments).start
