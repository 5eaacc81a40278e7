"""Beside: copies by kernels on a stream of their own, in order with what is computed.

Within one CUDA graph the two streams become two branches of it.
"""

from contextlib import AbstractContextManager, nullcontext

import torch


class Beside:
    """The order between copies and computation where both are one sequence, as on a CPU."""

    def fork(self) -> None:
        """Let copies from here on begin after what has been queued to compute."""

    def copies(self) -> AbstractContextManager[object]:
        """The context in which copies are queued."""
        return nullcontext()

    def mark(self) -> torch.cuda.Event | None:
        """Name what has been queued to copy so far."""
        return None

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Compute nothing more before the copies that ``mark`` names are there."""

    def join(self) -> None:
        """Compute nothing more before all copies are there."""


IN_TURN = Beside()
"""Copies and computation in turn on the current stream."""


class _OnStream(Beside):
    """The same order between a stream for copies and the current one.

    A capture may wait for nothing that began before it. So what has been waited for is never waited
    for again: the steps that warm up a graph leave nothing open that its capture would join.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Copies want few multiprocessors, but those before all that computes.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._is_open = False
        self._last: torch.cuda.Event | None = None  # Names all copies, if not none.

    def fork(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        self._is_open, self._last = True, None

    def copies(self) -> AbstractContextManager[object]:
        self._last = None
        return torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        self._last = self._stream.record_event()
        return self._last

    def wait(self, mark: torch.cuda.Event | None) -> None:
        assert mark is not None, "marks and waits belong to the same order"
        torch.cuda.current_stream(self._device).wait_event(mark)
        if mark is self._last:
            self._is_open = False

    def join(self) -> None:
        if self._is_open:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._is_open = False


def beside_on(device: torch.device) -> Beside:
    """A stream beside the current one of a GPU; on the host all is one sequence."""
    return _OnStream(device) if device.type == "cuda" else Beside()
