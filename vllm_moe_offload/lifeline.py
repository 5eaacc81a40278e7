"""Ties processes and what they leave on disk to the life of others, killed ones included.

A process that is killed cleans nothing up. The kernel does two things for it that others can
see: it closes its end of a pipe and gives back its locks on files.
"""

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

GRACE_S = 10.0
"""Seconds between asking an orphan to end and killing it; it may have a recording to write."""


def end_with_parent(grace_s: float = GRACE_S) -> None:
    """End this process when the one that started it is gone, however that ended.

    It is asked with SIGTERM if it handles that, and killed when it is still there after
    ``grace_s`` seconds. Does nothing in a process that multiprocessing has not started.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    watch = threading.Thread(
        target=_outlive, args=(parent.sentinel, grace_s), name="moe-offload-lifeline", daemon=True
    )
    watch.start()


def _outlive(parent: int, grace_s: float) -> None:
    wait([parent])
    # Without a handler it is not up yet or on its way out, and may be writing its last.
    if signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


class Claim:
    """A file that tells others, as long as this process lives, that something belongs to it.

    Args:
        path: the file, made if need be.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        draft = path.with_name(f"{path.name}.draft")
        self._file = draft.open("wb")
        # A file system without locks leaves every claim in force.
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX)
        # Nobody ever sees it without its lock.
        draft.replace(path)

    def release(self) -> None:
        """Give it up; the file goes."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def is_orphaned(path: Path) -> bool:
    """Whether the process that made this claim is gone; False if there is no claim."""
    try:
        with path.open("rb") as file:
            # Shared, so that two who look do not take each other for the owner.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
