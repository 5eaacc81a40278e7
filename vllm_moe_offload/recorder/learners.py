"""Learners: what others learn on the device, asked for only while that can be read."""

import threading
from collections.abc import Callable, Mapping

from vllm_moe_offload.warm_start import Section


class Learners:
    """Asks others what they have learned, unless the worker sleeps.

    ``rest`` and ``wake`` belong to the thread that runs the steps, ``sections`` to the one that
    writes.

    Args:
        learners: by the name of their section, what gives it and may wait for the device.
        complain: takes what went wrong.
    """

    def __init__(
        self, learners: Mapping[str, Callable[[], Section]], complain: Callable[[str], None]
    ) -> None:
        self._learners = learners
        self._complain = complain
        self._lock = threading.Lock()
        self._rests = False
        self._known: dict[str, Section] = {}

    def sections(self) -> dict[str, Section]:
        """What they have learned by now, or had when they came to rest.

        Of one that fails it is what it said last, if it ever said anything.
        """
        with self._lock:
            if not self._rests:
                self._ask()
            return dict(self._known)

    def rest(self) -> None:
        """Ask a last time, and not again before ``wake``; waits for whoever is asking."""
        with self._lock:
            if not self._rests:
                self._ask()
                self._rests = True

    def wake(self) -> None:
        """Let them be asked again: what they read is there."""
        # Without the lock, which may be held until the device has answered. Nobody else changes
        # this, and who still sees the old value takes what was known when they came to rest.
        self._rests = False

    def _ask(self) -> None:
        for name, learner in self._learners.items():
            try:
                self._known[name] = learner()
            except Exception as error:
                # Whatever it is, what is recorded must not suffer from it.
                self._complain(
                    f"cannot read what {name} has learned: {type(error).__name__}: {error}"
                )
