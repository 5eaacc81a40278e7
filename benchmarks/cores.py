"""Cores: which of them a timing runs on.

A step of a millisecond or two waits for the host, and what else a core of a shared machine has to
do lasts longer than many steps: one process may launch kernels at half the speed of another until
the scheduler moves it. Repeats on one core after the other meet a quiet one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def on_core(number: int, of: int) -> Iterator[None]:
    """Run the calling thread on one core, the threads that it has started anywhere.

    Args:
        number: of a repeat.
        of: repeats that are spread over the cores which the thread may use.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number * len(cores) // of % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
