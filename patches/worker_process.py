"""A worker process does not outlive its engine either.

Target: ``WorkerProc.worker_main`` in vllm.v1.executor.multiproc_executor.
Versions: 0.32, 0.33.
Why: it watches its parent only once the weights are loaded, and a step that hangs keeps it.
How: as in engine_process.
Can go: with engine_process.
"""

from types import ModuleType

from vllm_moe_offload.patches.engine_process import run_tied
from vllm_moe_offload.patches.wrapping import wrap


def apply(module: ModuleType) -> None:
    """Tie the process to its parent."""
    wrap(module.WorkerProc, "worker_main", run_tied)
