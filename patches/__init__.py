"""Everything that depends on vLLM's inside, one file a seam.

Each seam changes one module of vLLM in its ``apply``, which runs once vLLM has imported that
module; the seams themselves are imported no earlier, so that a process that never serves a model
pays nothing. A changed function calls the original unless an offloaded model is at hand. Where a
target has moved, the failure is kept and raised as soon as somebody asks for offloading; vLLM
without the plugin's option goes on working.
"""

import importlib
import importlib.util
from functools import partial
from types import ModuleType

from vllm_moe_offload.patches import when_imported
from vllm_moe_offload.patches.wrapping import PatchError

SEAMS = {
    "engine_args": "vllm.engine.arg_utils",
    "compile_cache": "vllm.config.vllm",
    "quantization": "vllm.config.vllm",
    "routed_experts": "vllm.model_executor.layers.fused_moe.routed_experts",
    "moe_runner": "vllm.model_executor.layers.fused_moe.runner.moe_runner",
    "model_loader": "vllm.model_executor.model_loader.base_loader",
    "dummy_weights": "vllm.model_executor.model_loader.dummy_loader",
    "block_pool": "vllm.v1.core.block_pool",
    "scheduler": "vllm.v1.core.sched.scheduler",
    "kv_layout": "vllm.v1.worker.worker_base",
    "lending": "vllm.v1.engine.core",
    "engine_startup": "vllm.v1.engine.utils",
    "cut_off": "vllm.v1.engine.async_llm",
    "engine_process": "vllm.v1.engine.core",
    "engine_signals": "vllm.v1.engine.core",
    "worker_process": "vllm.v1.executor.multiproc_executor",
    "api_server_process": "vllm.v1.utils",
    "worker": "vllm.v1.worker.gpu_worker",
    "cpu_worker": "vllm.v1.worker.cpu_worker",
    "metrics": "vllm.entrypoints.serve.instrumentator.metrics",
}
"""Module here and module of vLLM that it changes."""

_failures: list[PatchError] = []
_installed = False
_registered = False


def install() -> None:
    """Ask for every seam to be patched when vLLM imports it. Idempotent."""
    global _installed  # noqa: PLW0603
    if _installed:
        return
    _installed = True
    for seam, target in SEAMS.items():
        when_imported.call(target, partial(_apply, seam))


def note_registration() -> None:
    """Remember that vLLM has loaded the plugin in this process."""
    global _registered  # noqa: PLW0603
    _registered = True


def registered() -> bool:
    """Whether vLLM has loaded the plugin in this process."""
    return _registered


def require_all() -> None:
    """Raise the first failure of a patch, or one for a module that is not there any more.

    Raises:
        PatchError: this vLLM differs from what a patch expects.
    """
    if _failures:
        raise _failures[0]
    for target in SEAMS.values():
        if importlib.util.find_spec(target) is None:
            raise PatchError(
                f"moe-offload: this version of vLLM has no module {target}. "
                "Install a tested version of vLLM, or drop --plugin moe-offload."
            )


def _apply(seam: str, module: ModuleType) -> None:
    try:
        importlib.import_module(f"{__name__}.{seam}").apply(module)
    except PatchError as error:
        _failures.append(error)
    except (ImportError, AttributeError) as error:
        _failures.append(
            PatchError(
                f"moe-offload: {module.__name__} differs in this version of vLLM: {error}. "
                "Install a tested version of vLLM, or drop --plugin moe-offload."
            )
        )
