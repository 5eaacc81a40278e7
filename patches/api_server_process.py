"""An API server among several does not outlive the process that started them all.

Target: ``run_api_server_worker_proc`` in vllm.v1.utils.
Versions: 0.32, 0.33.
Why: it would keep the port, and the next start would fail.
How: as in engine_process.
Can go: with engine_process.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_moe_offload.patches.engine_process import tie
from vllm_moe_offload.patches.wrapping import wrap


def apply(module: ModuleType) -> None:
    """Tie the process to its parent."""
    wrap(module, "run_api_server_worker_proc", _run)


def _run(
    original: Callable[..., Any], address: Any, sock: Any, args: Any, *more: Any, **kwargs: Any
) -> Any:
    tie(args.additional_config)
    return original(address, sock, args, *more, **kwargs)
