"""What an engine says in the log when it is planned, and when its memory cannot be pinned."""

from collections.abc import Sequence

from vllm_moe_offload.budget import Budget
from vllm_moe_offload.offloaded_layer import LayerSpec
from vllm_moe_offload.sizes import format_size


def describe(specs: Sequence[LayerSpec], budget: Budget, device_type: str) -> str:
    """One line on what is offloaded and what it takes."""
    experts = sorted({spec.num_experts for spec in specs})
    return (
        f"moe-offload: {len(specs)} MoE layers of {_span(experts)} experts, "
        f"{format_size(budget.pool_bytes)} in the host pool, "
        f"{_span(sorted(set(budget.slots)))} slots a layer taking "
        f"{format_size(budget.slot_bytes)} of {device_type} memory, "
        f"{format_size(budget.staging_bytes)} of staging"
    )


def cost_of_unpinned(held: int, total: int) -> str:
    """What it means that so many bytes of the host pool are held on the GPU instead."""
    return (
        f"CUDA refused to pin {format_size(held)} of the host pool's {format_size(total)}. These "
        "experts are held in GPU memory as a whole, which leaves that much less to the KV cache. "
        "Raise the limit on locked memory (ulimit -l unlimited, docker run --ulimit memlock=-1) or "
        "free host memory."
    )


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
