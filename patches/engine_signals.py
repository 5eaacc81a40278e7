"""An idle engine process does not sleep through the signal that is to end it.

Target: ``EngineCoreProc.run_busy_loop`` and ``DPEngineCoreProc.run_busy_loop`` in
    vllm.v1.engine.core.
Versions: 0.32, 0.33.
Why: a SIGTERM that arrives while the loop is about to wait for requests wakes nothing, see
    ``signal_watch``; vLLM wakes the loop from the handler, which does not run. On a busy machine
    this meets some shutdowns of a hundred that follow a call at once, without the plugin as with
    it. The engine is killed five seconds later, and a recording loses what was not written yet.
How: a thread hears of signals whatever the main thread does, and puts vLLM's own message to wake
    up into the loop's queue.
Can go: when vLLM's engine waits in a way that no signal misses.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from vllm_moe_offload.patches.engine_process import offloads
from vllm_moe_offload.patches.wrapping import wrap
from vllm_moe_offload.signal_watch import waking_on_signals


def apply(module: ModuleType) -> None:
    """Let signals wake the loops."""
    wake_up = (module.EngineCoreRequestType.WAKEUP, None)

    def run(original: Callable[..., Any], self: Any) -> Any:
        if not offloads(self.vllm_config.additional_config):
            return original(self)
        with waking_on_signals(partial(self.input_queue.put_nowait, wake_up)):
            return original(self)

    wrap(module.EngineCoreProc, "run_busy_loop", run)
    wrap(module.DPEngineCoreProc, "run_busy_loop", run)
