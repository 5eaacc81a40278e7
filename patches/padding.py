"""Rows of padding choose no experts.

Target: routers of vllm.model_executor.layers.fused_moe.router, and ``ForwardContext.is_padding`` in
    vllm.forward_context, which both model runners fill before a step; it is a part of a buffer that
    stays where it is, so CUDA graphs read it too.
Versions: 0.32, 0.33.
Why: a batch is padded to the size of a CUDA graph, and what its last rows hold would ask for
    experts that nobody needs. vLLM's plain top-k kernels leave such rows out; its grouped and
    custom routers do not.
How: give the mask to the engine, whose first kernel leaves these rows out, behind routers that do
    not.
Can go: when every router of vLLM leaves padding out.
"""

from typing import Any

from torch import Tensor
from vllm import envs
from vllm.forward_context import get_forward_context, is_forward_context_available


def leaves_out(router: Any) -> bool:
    """Whether a router chooses nothing for rows of padding by itself."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
        FusedTopKBiasRouter,
    )
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    own = isinstance(router, FusedTopKBiasRouter | FusedTopKRouter)
    return own and bool(envs.VLLM_MOE_SKIP_PADDING)


def padding_of(num_tokens: int) -> Tensor | None:
    """Which rows of the running step are padding, bool [T]; None if that is not known."""
    if not is_forward_context_available():
        return None
    is_padding_T: Tensor | None = get_forward_context().is_padding
    # Rows that other workers have sent, or kept, are not those of the mask.
    if is_padding_T is None or is_padding_T.shape[0] != num_tokens:
        return None
    return is_padding_T
