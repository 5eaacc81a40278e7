"""Tells of signals at once while the main thread waits.

Python runs a signal's handler on the main thread, between two steps of the interpreter. A signal
that arrives after the last of them, but before the thread sleeps on a lock, only sets a flag; it
interrupts nothing, and the handler runs when something else ends the sleep. So does a signal that
the kernel hands to another thread.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NO_FD = -1
"""What stands for "nobody" in ``signal.set_wakeup_fd``."""


@contextmanager
def waking_on_signals(wake: Callable[[], None]) -> Iterator[None]:
    """Call ``wake`` within this context after each signal that has a handler of Python's.

    Does nothing on a thread that is not the main one, where Python has no handlers to run, and
    where an event loop listens already.

    Args:
        wake: ends what the main thread waits in; harmless if it does not wait. It is called on a
            thread of its own, after the flag has been set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before != NO_FD:
        signal.set_wakeup_fd(before)
        os.close(writer)
        os.close(reader)
        yield
        return
    threading.Thread(
        target=_watch, args=(reader, wake), name="moe-offload-signals", daemon=True
    ).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(NO_FD)
        os.close(writer)  # ends the thread


def _watch(reader: int, wake: Callable[[], None]) -> None:
    with open(reader, "rb", buffering=0) as signals:
        while signals.read(1):
            wake()
