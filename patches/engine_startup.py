"""A server that is still loading ends when it is told to.

Target: ``wait_for_engine_startup`` in vllm.v1.engine.utils.
Versions: 0.32, 0.33.
Why: the API server waits in pyzmq's poll, which drops what a signal handler raises, so SIGTERM is
    lost and SIGINT waits for the weights, of which an offloaded model has the more.
How: meanwhile both signals kill the engine processes, whose end vLLM notices; what follows is an
    exit with the signal's status. Worker processes end with their engine, see worker_process.
Can go: when vLLM ends on signals while its engines load.
"""

import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vllm_moe_offload.metrics.page import FOLDER
from vllm_moe_offload.patches.wrapping import PatchError, wrap

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def apply(module: ModuleType) -> None:
    """Listen to signals while engines start."""
    if list(inspect.signature(module.wait_for_engine_startup).parameters)[-1:] != ["launch"]:
        raise PatchError(
            "moe-offload: wait_for_engine_startup of this version of vLLM waits for something "
            "else. Install a tested version of vLLM, or drop --plugin moe-offload."
        )
    wrap(module, "wait_for_engine_startup", _wait)


def _wait(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    launch = kwargs["launch"] if "launch" in kwargs else args[-1]
    # Engines under Ray are actors, and a node without engines has no manager.
    processes = getattr(launch.engine_manager, "processes", None)
    is_main = threading.current_thread() is threading.main_thread()
    # The folder is there if a configuration of this process offloads.
    if not processes or not is_main or FOLDER not in os.environ:
        return original(*args, **kwargs)
    with _killing(processes) as received:
        try:
            result = original(*args, **kwargs)
        except RuntimeError:
            if not received:
                raise
    if not received:
        return result
    # No KeyboardInterrupt: the context of vLLM's socket swallows it.
    raise SystemExit(128 + received[0])


@contextmanager
def _killing(processes: Sequence[Any]) -> Iterator[list[int]]:
    """Kill processes on signals; gives those that were received."""
    received: list[int] = []

    def end(number: int, _frame: object) -> None:
        received.append(number)
        for process in processes:
            process.kill()

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            # None stands for a handler that Python has not set and cannot set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
