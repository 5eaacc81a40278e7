"""From owners of memory to the layers that steps work on.

Legend: L layers, E local experts of a layer, A arrivals (see ``kernels.resolve``), R staging rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_moe_offload.beside import beside_on
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.operations import operations_for
from vllm_moe_offload.offloaded_layer import Block, LayerSpec, OffloadedLayer
from vllm_moe_offload.pool import HostPool
from vllm_moe_offload.residencies import Residencies
from vllm_moe_offload.staging import Staging, rows_of
from vllm_moe_offload.step import MAX_PARTS
from vllm_moe_offload.step_log import MAX_EXPERTS, StepLog


@dataclass(frozen=True)
class Memory:
    """What layers share, whoever owns the slots."""

    pool: HostPool
    staging: Staging
    step_log: StepLog | None
    device: torch.device


def make_layers(
    specs: Sequence[LayerSpec],
    memory: Memory,
    slot_rows_L: Sequence[Tensor],
    residencies: Residencies,
) -> list[OffloadedLayer]:
    """Give every layer its share.

    Args:
        specs: of all layers.
        memory: the pool is pinned already.
        slot_rows_L: the slots of each layer, uint8 [S, B].
        residencies: of all layers, of as many slots.
    """
    device, log = memory.device, memory.step_log
    beside, operations = beside_on(device), operations_for(device)
    layers = []
    for number, (spec, segment) in enumerate(zip(specs, memory.pool.segments, strict=True)):
        experts = spec.num_experts
        layers.append(
            OffloadedLayer(
                spec=spec,
                pool_rows_EB=memory.pool.device_rows(segment, device),
                slots=Block.of(spec, slot_rows_L[number]),
                halves=_staged(spec, memory.staging.halves),
                blocks=_staged(spec, memory.staging.blocks),
                residency=residencies[number],
                row_of_E=torch.empty(experts, dtype=torch.int32, device=device),
                slot_of_AE=torch.empty(1 + MAX_PARTS, experts, dtype=torch.int32, device=device),
                operations=operations,
                beside=beside,
                is_held=memory.pool.is_held(segment),
                log_TK=log.layer(number) if log else None,
            )
        )
    return layers


def _staged(spec: LayerSpec, blocks: Sequence[Tensor]) -> tuple[Block, ...]:
    layout, limit = spec.layout, spec.num_experts
    return tuple(Block.of(spec, rows_of(block, layout, limit=limit)) for block in blocks)


def make_step_log(
    specs: Sequence[LayerSpec], max_tokens: int, device: torch.device, trace_path: str | None
) -> StepLog:
    """Where all layers leave the ids of steps of so many tokens, for ``trace_path``.

    Raises:
        OffloadError: the layers differ in what they choose, or have more experts than a log can
            tell apart.
    """
    routings = [spec.routing for spec in specs]
    top_ks = sorted({routing.top_k for routing in routings if routing is not None})
    problem = None
    if len(top_ks) != 1 or None in routings:
        problem = f"its layers choose different numbers of experts a token: {top_ks}"
    elif max(r.num_experts for r in routings if r is not None) > MAX_EXPERTS:
        problem = f"it has layers of more than {MAX_EXPERTS} experts"
    if problem:
        raise OffloadError(
            "trace_path",
            trace_path,
            f"this model cannot be recorded: {problem}",
            "Drop trace_path",
        )
    return StepLog(len(specs), max_tokens, top_ks[0], device)
