"""How many slots each layer gets, and whether everything fits. Pure arithmetic.

A slot of one decoder layer costs its row; all layers get the same number of slots, because on
recorded activations a cache a layer is as good as one cache for all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.memory import HostMemory
from vllm_moe_offload.sizes import GIB, MIB, format_size

AUTO_SHARE = 0.25
"""Share of the experts that has a slot by default, where the device has the memory."""

AUTO_STAGING_BYTES = 640 * MIB
"""Largest staging by default, though never less than two rows. While a GPU computes attention
over 32k tokens, 12 ms in Qwen3-30B-A3B, PCIe 5.0 delivers as much."""


@dataclass(frozen=True)
class LayerDemand:
    """What one offloaded layer needs."""

    name: str
    num_experts: int
    row_bytes: int


@dataclass(frozen=True)
class Budget:
    """Slots of each layer in order, and the bytes of everything."""

    slots: tuple[int, ...]
    pool_bytes: int
    slot_bytes: int
    staging_bytes: int
    largest_staged_row: int
    """Bytes of the largest row that passes through staging, 0 if none does."""

    @property
    def device_bytes(self) -> int:
        """Bytes on the compute device: slots and staging."""
        return self.slot_bytes + self.staging_bytes


def slots_for_share(share: float, num_experts: int) -> int:
    """Slots of a layer that hold this share of its experts, rounded down."""
    # A share such as 0.29 of 100 experts must not lose an expert to binary rounding.
    return math.floor(share * num_experts + 1e-6)


def plan_budget(
    layers: Sequence[LayerDemand],
    config: MoeOffloadConfig,
    *,
    borrows: bool = False,
    device_free: int | None = None,
    taken_bytes: int = 0,
) -> Budget:
    """Split the memory that the options give among the layers.

    Args:
        layers: all of them.
        config: the options.
        borrows: whether slots are borrowed from the KV cache later, and none is allocated.
        device_free: bytes that may be taken of the device, if known. Where no option gives the
            slots' size they get half of it at most; the rest is for the KV cache and for steps.
        taken_bytes: slots that another model, which this one drafts for, holds of ``gpu_gb``.

    Raises:
        OffloadError: staging is too small for two experts.
    """
    most = None
    if layers and not borrows:
        most = _most_slots(layers, config, device_free, taken_bytes)
    slots = tuple(0 if borrows else _num_slots(layer, most, config) for layer in layers)
    streaming = [
        layer for layer, count in zip(layers, slots, strict=True) if count < layer.num_experts
    ]
    return Budget(
        slots=slots,
        pool_bytes=sum(layer.num_experts * layer.row_bytes for layer in layers),
        slot_bytes=sum(count * layer.row_bytes for count, layer in zip(slots, layers, strict=True)),
        staging_bytes=_staging_bytes(streaming, config) if streaming else 0,
        largest_staged_row=max((layer.row_bytes for layer in streaming), default=0),
    )


def check_budget(
    budget: Budget,
    config: MoeOffloadConfig,
    *,
    host: HostMemory,
    device_free: int,
    device_name: str,
    device_is_host: bool,
) -> None:
    """Refuse a budget that cannot be met.

    Args:
        budget: what is about to be allocated.
        config: the options it came from.
        host: host memory that can still be allocated.
        device_free: bytes free on the compute device.
        device_name: what to call the device in a message.
        device_is_host: whether the device's memory is the host's, as on a CPU.

    Raises:
        OffloadError: with both figures and the option to change.
    """
    if budget.device_bytes > device_free:
        raise OffloadError(
            _size_option(config),
            _size_value(config),
            f"slots ({format_size(budget.slot_bytes)}) and staging "
            f"({format_size(budget.staging_bytes)}) need {format_size(budget.device_bytes)}, but "
            f"{device_name} has {format_size(device_free)} free",
            "Lower gpu_gb, cache_fraction or staging_mb, or let vLLM take more of the GPU",
        )
    needed = budget.pool_bytes + (budget.device_bytes if device_is_host else 0)
    if needed > host.available:
        raise OffloadError(
            "host pool",
            format_size(budget.pool_bytes),
            f"the experts need {format_size(needed)} of host memory, but {host.limited_by} leaves "
            f"{format_size(host.available)}",
            "Free or add host memory, raise the container's limit, or use a checkpoint with "
            "smaller experts",
        )


def _most_slots(
    layers: Sequence[LayerDemand],
    config: MoeOffloadConfig,
    device_free: int | None,
    taken_bytes: int,
) -> int | None:
    """Slots of a layer that there is memory for, None where a share of the experts decides."""
    num_bytes = None
    if config.gpu_gb != "auto":
        num_bytes = max(0, int(config.gpu_gb * GIB) - taken_bytes)
    elif config.cache_fraction is None and device_free is not None:
        num_bytes = device_free // 2
    return None if num_bytes is None else num_bytes // sum(layer.row_bytes for layer in layers)


def _num_slots(layer: LayerDemand, most: int | None, config: MoeOffloadConfig) -> int:
    slots = layer.num_experts
    if config.gpu_gb == "auto":
        share = AUTO_SHARE if config.cache_fraction is None else config.cache_fraction
        slots = slots_for_share(share, layer.num_experts)
    return slots if most is None else min(slots, most)


def _staging_bytes(streaming: Sequence[LayerDemand], config: MoeOffloadConfig) -> int:
    largest = max(layer.row_bytes for layer in streaming)
    if config.staging_mb == "auto":
        rows = min(AUTO_STAGING_BYTES // largest, max(layer.num_experts for layer in streaming))
        return max(2, rows) * largest
    given = int(config.staging_mb * MIB)
    if given < 2 * largest:
        raise OffloadError(
            "staging_mb",
            config.staging_mb,
            f"two experts of {format_size(largest)} each must fit, one to be loaded while the "
            "other is read",
            f"Give at least {math.ceil(2 * largest / MIB)}, or auto",
        )
    return given


def _size_option(config: MoeOffloadConfig) -> str:
    return "gpu_gb" if config.cache_fraction is None else "cache_fraction"


def _size_value(config: MoeOffloadConfig) -> object:
    return config.gpu_gb if config.cache_fraction is None else config.cache_fraction
