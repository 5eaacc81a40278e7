"""Whether a CUDA graph that is being captured may end between two MoE layers.

Reads: ``ForwardContext.cudagraph_runtime_mode`` in vllm.forward_context, and whether a breakable
    graph is being captured (vllm.compilation.breakable_cudagraph).
Versions: 0.32, 0.33.
Why: copies beside the computation must be joined in the graph that began them, and piecewise
    graphs end at every attention.
How: what is captured within a forward pass, and neither piecewise nor breakable, is the whole of
    it. The first model runner says so (FULL), the second one captures it under the mode NONE.
Can go: when vLLM tells a layer what is captured around it.
"""

import torch


def spans_layers() -> bool:
    """Whether what is left beside a layer's computation may go on until the next layer."""
    if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        return True
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available() or BreakableCUDAGraphCapture.is_active():
        return False
    return bool(get_forward_context().cudagraph_runtime_mode != CUDAGraphMode.PIECEWISE)
