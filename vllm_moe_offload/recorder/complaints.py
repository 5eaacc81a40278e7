"""Complaints: what goes wrong while recording, in few lines of the log."""

import time
from collections.abc import Callable, Mapping


class Complaints:
    """Repeats itself at most once in an interval, and tells of losses only when there are more.

    Args:
        interval_s: seconds between two lines on one kind of problem.
        warn: takes a line for the log.
    """

    def __init__(self, interval_s: float, warn: Callable[[str], None]) -> None:
        self._interval_s = interval_s
        self._warn = warn
        self._silent_until = 0.0
        self._reported: Mapping[str, int] = {}

    def say(self, problem: str) -> None:
        """Tell of a problem that may pass, unless one was told of lately."""
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + self._interval_s
            self.insist(problem)

    def insist(self, problem: str) -> None:
        """Tell of a problem at once."""
        self._warn(f"moe-offload: {problem}.")

    def losses(self, counts: Mapping[str, int]) -> None:
        """Tell how much has been lost in all, if it has become more.

        Args:
            counts: by what was lost and why.
        """
        if any(count > self._reported.get(what, 0) for what, count in counts.items()):
            self._reported = counts
            texts = [f"{count} {what}" for what, count in counts.items() if count]
            self.insist(f"not recorded so far: {', '.join(texts)}")
