"""Whether the host and the device can hold what an engine has planned."""

import torch

from vllm_moe_offload.budget import Budget, check_budget
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.memory import HostMemory


def check_memory(
    budget: Budget,
    config: MoeOffloadConfig,
    host: HostMemory,
    device: torch.device,
    device_free: int | None = None,
) -> None:
    """Refuse a budget that cannot be met, see ``check_budget``.

    Args:
        budget: what is about to be allocated.
        config: the options it came from.
        host: what this process may take of the host.
        device: where the layers are computed; the host itself is allowed.
        device_free: bytes that may be taken of it, None for all that are free.

    Raises:
        OffloadError: with both figures and the option to change.
    """
    on_host = device.type == "cpu"
    check_budget(
        budget,
        config,
        host=host,
        device_free=host.available if on_host else _free(device, device_free),
        device_name=host.limited_by if on_host else _name(device, device_free),
        device_is_host=on_host,
    )


def _free(device: torch.device, allowed: int | None) -> int:
    free: int = torch.cuda.mem_get_info(device)[0]
    return free if allowed is None else min(free, allowed)


def _name(device: torch.device, allowed: int | None) -> str:
    name: str = torch.cuda.get_device_name(device)
    if allowed is None:
        return name
    return (
        f"{name}, of which vLLM is to take no more than --gpu-memory-utilization or "
        "--kv-cache-memory-bytes leave,"
    )
