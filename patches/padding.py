"""Rows of padding choose no experts.

Target: ``_select_experts`` of a layer's router, vllm.model_executor.layers.fused_moe.router.
Reads: ``ForwardContext.is_padding`` in vllm.forward_context, which both model runners fill before a
    step; it is a part of a buffer that stays where it is, so CUDA graphs read it too.
Versions: 0.32, 0.33.
Why: a batch is padded to the size of a CUDA graph, and what its last rows hold would ask for
    experts that nobody needs. vLLM's plain top-k kernels leave such rows out; its grouped and
    custom routers do not.
How: put -1 for the ids of these rows, on the device, after routers that do not.
Can go: when every router of vLLM leaves padding out.
"""

from functools import partial
from typing import Any

from torch import Tensor
from vllm import envs
from vllm.forward_context import get_forward_context, is_forward_context_available

_DONE = "moe_offload_leaves_padding_out"


def leave_out(router: Any) -> None:
    """Let a router choose nothing for rows of padding. Idempotent."""
    if hasattr(router, _DONE) or _leaves_out(router):
        return
    router._select_experts = partial(_select_experts, router._select_experts)
    setattr(router, _DONE, True)


def _leaves_out(router: Any) -> bool:
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
        FusedTopKBiasRouter,
    )
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    own = isinstance(router, FusedTopKBiasRouter | FusedTopKRouter)
    return own and bool(envs.VLLM_MOE_SKIP_PADDING)


def _select_experts(original: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    weight_TK, ids_TK = original(*args, **kwargs)
    if is_forward_context_available():
        is_padding_T = get_forward_context().is_padding
        # Rows that other workers have sent, or kept, are not those of the mask.
        if is_padding_T is not None and is_padding_T.shape[0] == ids_TK.shape[0]:
            ids_TK = ids_TK.masked_fill(is_padding_T.unsqueeze(1), -1)
    return weight_TK, ids_TK
