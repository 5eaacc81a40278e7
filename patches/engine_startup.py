"""A server that is still loading ends when it is told to.

Target: ``wait_for_engine_startup`` in vllm.v1.engine.utils.
Versions: 0.32, 0.33.
Why: the API server waits in pyzmq's poll, which drops what a signal handler raises, so SIGTERM is
    lost and SIGINT waits for the weights, of which an offloaded model has the more.
How: meanwhile both signals kill the engine processes, whose end vLLM notices; what follows is the
    exit that the signal asked for.
Can go: when vLLM ends on signals while its engines load.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_moe_offload.metrics.page import FOLDER
from vllm_moe_offload.patches.wrapping import wrap

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def apply(module: ModuleType) -> None:
    """Listen to signals while engines start."""
    wrap(module, "wait_for_engine_startup", _wait)


def _wait(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    launch = kwargs["launch"] if "launch" in kwargs else args[-1]
    processes = getattr(launch.engine_manager, "processes", None)
    is_main = threading.current_thread() is threading.main_thread()
    # The folder is there if a configuration of this process offloads.
    if not processes or not is_main or FOLDER not in os.environ:
        return original(*args, **kwargs)
    received: list[int] = []

    def end(number: int, _frame: object) -> None:
        received.append(number)
        for process in processes:
            process.kill()

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        return original(*args, **kwargs)
    except RuntimeError:
        if not received:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received[0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + received[0])
