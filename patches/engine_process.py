"""An engine process does not outlive the server that started it.

Target: ``EngineCoreProc.run_engine_core`` in vllm.v1.engine.core.
Versions: 0.32, 0.33.
Why: the engine waits for ever for requests of an API server that was killed, and the pinned
    memory of all experts waits with it, so that the next start finds no room.
How: a thread sees the parent go and asks the engine to shut down as vLLM does.
Can go: when the engine notices by itself that its API server is gone.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_moe_offload.config import KEY
from vllm_moe_offload.lifeline import end_with_parent
from vllm_moe_offload.patches.wrapping import wrap


def apply(module: ModuleType) -> None:
    """Tie the process to its parent."""
    wrap(module.EngineCoreProc, "run_engine_core", run_tied)


def run_tied(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run the main function of a process, which gets vLLM's configuration by name."""
    tie(kwargs["vllm_config"].additional_config)
    return original(*args, **kwargs)


def tie(additional_config: Any) -> None:
    """Tie this process to its parent if the server offloads."""
    if offloads(additional_config):
        end_with_parent()


def offloads(additional_config: Any) -> bool:
    """Whether the server with this configuration offloads."""
    return isinstance(additional_config, dict) and KEY in additional_config
