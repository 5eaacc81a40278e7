"""Whether the host and the device can hold what an engine has planned."""

import torch

from vllm_moe_offload.budget import Budget, check_budget
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.memory import HostMemory


def check_memory(
    budget: Budget, config: MoeOffloadConfig, host: HostMemory, device: torch.device
) -> None:
    """Refuse a budget that cannot be met, see ``check_budget``.

    Args:
        budget: what is about to be allocated.
        config: the options it came from.
        host: what this process may take of the host.
        device: where the layers are computed; the host itself is allowed.

    Raises:
        OffloadError: with both figures and the option to change.
    """
    on_host = device.type == "cpu"
    check_budget(
        budget,
        config,
        host=host,
        device_free=host.available if on_host else torch.cuda.mem_get_info(device)[0],
        device_name=host.limited_by if on_host else torch.cuda.get_device_name(device),
        device_is_host=on_host,
    )
