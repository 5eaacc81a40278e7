"""Fails in a worker that has not loaded the plugin.

Target: ``--worker-extension-cls``, which vLLM resolves in every worker before it loads a model.
Versions: 0.32, 0.33.
Why: a worker without the plugin would load the experts into GPU memory as if nothing was asked.
How: a worker that lacks the package cannot import this module; one that has it but was told not
    to load the plugin (``VLLM_PLUGINS``) gets the error below.
Can go: when vLLM compares the plugins of its processes.
"""

import os

from vllm_moe_offload import patches
from vllm_moe_offload.errors import OffloadError

if not patches.registered():
    raise OffloadError(
        "VLLM_PLUGINS",
        os.environ.get("VLLM_PLUGINS"),
        "a worker process has not loaded the plugin moe-offload",
        "Install vllm-moe-offload in the worker's environment and name it in VLLM_PLUGINS, "
        "or unset VLLM_PLUGINS",
    )
patches.require_all()


class WorkerGuard:
    """Adds nothing to the worker: importing this module is the check."""
