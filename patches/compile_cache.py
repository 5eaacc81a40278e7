"""Compiled code does not depend on the plugin's options.

Target: ``VllmConfig.compute_hash`` in vllm.config.vllm.
Versions: 0.32, 0.33.
Why: vLLM hashes all of ``additional_config`` into the key of its compile cache, so that a server
    with other slots would compile for a minute the very same code; builds tuned apart from each
    other may also round differently.
How: hash that the plugin is on and for which layers, as a layer left to vLLM may pad what it is
    given, and leave out how it is set otherwise. Not with vLLM's start-up plan, which
    keeps the size of the KV cache under the same key, and that size does depend on the options.
Can go: when a plugin can give the hash of its own options.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_moe_offload.config import KEY
from vllm_moe_offload.patches.wrapping import wrap


def apply(module: ModuleType) -> None:
    """Hash configurations without the plugin's options."""
    wrap(module.VllmConfig, "compute_hash", _compute_hash)


def _compute_hash(original: Callable[..., str], self: Any) -> str:
    from vllm import envs

    extra = self.additional_config
    if not isinstance(extra, dict) or KEY not in extra or envs.VLLM_ENABLE_STARTUP_PLAN:
        return original(self)
    self.additional_config = {**extra, KEY: {"layers": extra[KEY].get("layers", "all")}}
    try:
        return original(self)
    finally:
        self.additional_config = extra
