"""Turns: several GPUs of one host share its memory, so that one is timed while the others wait.

What runs side by side is told the same file; each process that times something holds it meanwhile.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TURN_FILE = "BENCHMARK_TURN_FILE"
"""The variable that names the file; where it is not set nobody else is timed."""


@contextmanager
def my_turn() -> Iterator[None]:
    """Wait until nobody else is timed, and let nobody else be timed in the context."""
    path = os.environ.get(TURN_FILE)
    if not path:
        yield
        return
    # The lock ends with the file, also where the process is killed.
    with Path(path).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
