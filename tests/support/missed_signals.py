"""Signals that the main thread sleeps through, on purpose rather than by chance."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ASLEEP_S = 0.1
"""From where Python last was before it waits, to the wait itself."""

PATIENCE_S = 10.0


@contextmanager
def missed(
    number: int, otherwise: Callable[[], None], patience_s: float = PATIENCE_S
) -> Iterator[None]:
    """Send a signal once the main thread waits for a lock, in a way that does not interrupt it.

    Args:
        number: a signal whose handler is one of Python's. It is sent to another thread, which
            leaves the same behind as one that arrives just before the main thread waits.
        otherwise: ends the wait if nothing else does.
        patience_s: seconds before that.
    """
    done = threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def send() -> None:
        while sys._current_frames()[main].f_code is not threading.Condition.wait.__code__:
            time.sleep(0.001)
        time.sleep(ASLEEP_S)
        signal.pthread_kill(threading.get_ident(), number)
        if not done.wait(patience_s):
            otherwise()

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        yield
    finally:
        done.set()
        sender.join()
