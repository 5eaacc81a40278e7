"""The CPU worker's warm-up is not part of the statistics either.

Target: ``CPUWorker.compile_or_warm_up_model`` in vllm.v1.worker.cpu_worker.
Versions: 0.32, 0.33.
Why: it does not call the method of ``Worker`` that it overrides.
How: statistics start anew after it.
Can go: when the CPU worker calls the method that it overrides.
"""

from types import ModuleType

from vllm_moe_offload.patches.worker import warm_up
from vllm_moe_offload.patches.wrapping import wrap


def apply(module: ModuleType) -> None:
    """Start the statistics after the CPU worker's own warm-up."""
    wrap(module.CPUWorker, "compile_or_warm_up_model", warm_up)
