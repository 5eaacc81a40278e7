"""Requests that a shutdown cuts off are told so, and the server ends.

Target: ``AsyncLLM.shutdown`` in vllm.v1.engine.async_llm.
Versions: 0.32, 0.33.
Why: it kills the engine and cancels what reads its answers; requests that still wait for one wait
    for ever, and the API server waits for them: a signal under load does not end it.
How: they get the error that they would get from an engine that has died.
Can go: when vLLM ends its requests before it shuts down.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_moe_offload.patches.engine_process import offloads
from vllm_moe_offload.patches.wrapping import wrap


def apply(module: ModuleType) -> None:
    """Let a shutdown end requests."""
    assert callable(module.OutputProcessor.propagate_error)  # fails where it has moved
    wrap(module.AsyncLLM, "shutdown", _shutdown)


def _shutdown(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    # It is also called on an object whose construction has failed.
    reader = getattr(self, "output_handler", None)
    result = original(self, *args, **kwargs)
    if reader is None or not offloads(self.vllm_config.additional_config):
        return result
    from vllm.v1.engine.exceptions import EngineDeadError

    loop = reader.get_loop()
    if not loop.is_closed():
        # A signal's shutdown runs beside the loop, on another thread.
        loop.call_soon_threadsafe(self.output_processor.propagate_error, EngineDeadError())
    return result
