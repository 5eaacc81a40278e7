"""What differs between the GPUs that kernels are launched on."""

from functools import cache

import torch

MOST_SHARED_BYTES = 227 * 1024
"""Shared memory of a program on the GPUs that tiles were timed on, H100 and H200."""


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
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)
