"""Keep torch.compile out of the engine on CPU, and padding out of an offloaded layer.

Target: ``MoERunner._select_forward`` in vllm.model_executor.layers.fused_moe.runner.moe_runner.
Versions: 0.32, 0.33.
Why: on CPU vLLM calls the MoE forward as plain Python, and Dynamo would trace into the engine. And
    this is where a layer's experts and its router are first at hand together, see ``padding``.
How: choose the opaque operator that vLLM uses on CUDA.
Can go: when the CPU backend uses the operator too, and ``padding`` can go.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from vllm_moe_offload.patches.padding import leaves_out, padding_of
from vllm_moe_offload.patches.wrapping import wrap


def apply(module: ModuleType) -> None:
    """Choose the operator for models that are offloaded."""
    wrap(module.MoERunner, "_select_forward", _select_forward)


def _select_forward(original: Callable[..., Any], self: Any) -> Any:
    # Imports from the package that holds the target, which is incomplete when we are applied.
    from vllm_moe_offload import layer as offload_layer

    if offload_layer.building_engine() is None:
        return original(self)
    method = self.routed_experts.quant_method
    if offload_layer.is_offloaded(method) and not leaves_out(self.router):
        method.offload_padding = padding_of
    operators = torch.ops.vllm
    return operators.moe_forward if self._shared_experts is None else operators.moe_forward_shared
