"""What differs between the GPUs that kernels are launched on."""

from functools import cache

import torch

MOST_SHARED_BYTES = 227 * 1024
"""Shared memory of a program on the GPUs that tiles were timed on, H100 and H200."""


_LEAST_SHARED_BYTES = 64 * 1024
"""Of all GPUs that vLLM serves: compute capability 7.5."""


@cache
def has_e4m3(device: torch.device) -> bool:
    """Whether kernels may take and multiply e4m3: from compute capability 8.9 on.

    True without a GPU, for Triton's interpreter knows the type.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have, in bytes; without a GPU as on the largest ones."""
    if device.type != "cuda":
        return MOST_SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    # Not every build of torch for NVIDIA's GPUs tells it.
    return int(getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED_BYTES))
