"""What differs between the GPUs that kernels are launched on."""

from functools import cache

import torch


@cache
def has_e4m3(device: torch.device) -> bool:
    """Whether kernels may take and multiply e4m3: from compute capability 8.9 on.

    True without a GPU, for Triton's interpreter knows the type.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
