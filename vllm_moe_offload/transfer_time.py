"""How long an expert takes to the device, measured before anybody is served."""

import time
from collections.abc import Sequence

import torch

from vllm_moe_offload.kernels.operations import operations_for
from vllm_moe_offload.offloaded_layer import OffloadedLayer


def row_seconds(layer: OffloadedLayer, device: torch.device) -> float:
    """Measure how long one expert takes to the device; waits for it.

    Into staging where there is some, for slots may be somebody else's memory; else into slots,
    in which nothing may be resident.
    """
    block = layer.halves[0] if layer.halves[0].num_rows else layer.slots
    rows = min(block.num_rows, layer.spec.num_experts, 16)
    number_N = torch.arange(rows, dtype=torch.int32, device=device)
    length = torch.full((1,), rows, dtype=torch.int32, device=device)
    gather = operations_for(device).gather

    def run() -> float:
        start = time.perf_counter()
        gather(layer.pool_rows_EB, block.rows_RB, number_N, number_N, length)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    run()
    return min(run() for _ in range(3)) / rows


def row_seconds_by_layer(layers: Sequence[OffloadedLayer], device: torch.device) -> list[float]:
    """What an expert of each layer takes to the device, at the rate of the largest one."""
    loading = [x for x in layers if not x.is_held]
    if not loading:
        return [0.0] * len(layers)  # Nothing ever crosses the link.
    largest = max(loading, key=lambda layer: layer.spec.layout.row_bytes)
    per_byte = row_seconds(largest, device) / largest.spec.layout.row_bytes
    return [per_byte * layer.spec.layout.row_bytes for layer in layers]
