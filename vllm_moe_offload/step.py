"""One step through one layer: resolve, move what is missing, compute, in a fixed set of launches.

What is at hand is computed while the rest is on its way, and what has come while more comes:

    compute:  resolve | hits       | part 0 | part 1 | wave 0 | wave 1 ...
    copies:           | part 0     | part 1 | wave 0 | wave 1 | ...

Experts that get a slot come in up to ``MAX_PARTS`` parts; those that get none come in waves
through the two halves of staging. How many launches there are, and of what size, follows from
shapes alone, so a CUDA graph of one step serves every other.

Legend: T tokens, K choices a token, E local experts, H hidden size, A arrivals (see
``kernels.resolve``).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_moe_offload.beside import IN_TURN, Beside
from vllm_moe_offload.kernels.resolve import Padding
from vllm_moe_offload.offloaded_layer import Block, OffloadedLayer
from vllm_moe_offload.products import Products

MAX_PARTS = 2
"""Parts in which a step's loads come."""

FEW_PAIRS = 16
"""Up to so many routed pairs the loads come first: what hits take to compute is little, and the
launches of further parts would cost a step that misses nothing more than they save another."""

Mark = torch.cuda.Event | None


def run_step(
    layer: OffloadedLayer,
    x_TH: Tensor,
    weight_TK: Tensor,
    ids_TK: Tensor,
    chosen_TK: Tensor | None = None,
    ahead: Callable[[Tensor, Tensor], None] | None = None,
    is_padding_T: Tensor | None = None,
) -> Tensor:
    """Compute the routed experts of a layer.

    Args:
        layer: what is resident changes in it, unless the step is a sweep.
        x_TH: hidden states.
        weight_TK: router weights.
        ids_TK: routed local expert ids; negative ones are inactive.
        chosen_TK: the router's ids where the local ones differ.
        ahead: called with the input and the ids when what is missing has been queued: the copies
            that it queues come after demand.
        is_padding_T: rows that choose nothing, whatever their ids are.

    Returns:
        [T, H] of the type of ``x_TH``.
    """
    routed_TK, padding = ids_TK, None
    if is_padding_T is not None:
        padding = Padding(is_padding_T, torch.empty_like(ids_TK))
        ids_TK = padding.active_TK
    products = Products(layer, x_TH, weight_TK, ids_TK)
    evict, parts = not layer.is_sweep(ids_TK.numel()), num_parts(layer, ids_TK.numel())
    layer.operations.resolve(
        routed_TK, layer.residency.tables, layer.residency.work, evict=evict,
        dispatch=products.lists, log=layer.log(routed_TK if chosen_TK is None else chosen_TK),
        slot_of_AE=layer.slot_of_AE[: 1 + parts] if parts else None, padding=padding,
    )  # fmt: skip
    waves = wave_starts(layer, ids_TK.numel(), evict=evict)
    beside = layer.beside if parts or len(waves) > 1 else IN_TURN
    beside.fork()
    copies = max(1, parts)
    loads = [_load(layer, beside, part, copies) for part in range(copies)]
    halves = len(layer.halves)
    arriving = [_stage(layer, beside, waves, wave) for wave in range(min(halves, len(waves)))]
    if ahead is not None and len(waves) <= halves:
        ahead(x_TH, ids_TK)
    _compute_slots(layer, beside, products, loads, hits_first=parts > 0)
    for wave, first in enumerate(waves):
        beside.wait(arriving[wave])
        _compute_wave(layer, products, layer.halves[wave % halves], first)
        if wave + halves < len(waves):
            beside.fork()  # The half is free now.
            arriving.append(_stage(layer, beside, waves, wave + halves))
            if ahead is not None and wave + halves + 1 == len(waves):
                ahead(x_TH, ids_TK)
    return products.total()


def num_parts(layer: OffloadedLayer, num_pairs: int) -> int:
    """In how many parts a step's loads come while others compute; 0 where they come first."""
    if not 0 < layer.residency.num_slots < layer.spec.num_experts:
        return 0  # After the first steps nothing is missing, or nothing has a slot.
    return MAX_PARTS if num_pairs > FEW_PAIRS else 0


def wave_starts(layer: OffloadedLayer, num_pairs: int, *, evict: bool) -> range:
    """First positions in the list of streams of every wave that a step may need.

    The bound follows from shapes and from the slots that never close, so that the launches are the
    same in every step of a shape. On the host the list's own length is free to read and ends the
    waves earlier.
    """
    experts, slots = layer.spec.num_experts, layer.residency.least_open
    active = min(experts, num_pairs)
    bound = max(0, active - slots) if evict else min(active, experts - slots)
    if bound and layer.row_of_E.device.type == "cpu":
        bound = int(layer.residency.work.num_streams)
    return range(0, bound, max(1, layer.halves[0].num_rows))


def _load(layer: OffloadedLayer, beside: Beside, part: int, parts: int) -> Mark:
    work = layer.residency.work
    with beside.copies():
        layer.operations.gather(
            layer.pool_rows_EB, layer.slots.rows_RB, work.load_expert_E, work.load_slot_E,
            work.num_loads, part=part, parts=parts,
        )  # fmt: skip
    return beside.mark()


def _stage(layer: OffloadedLayer, beside: Beside, waves: range, wave: int) -> Mark:
    work, block = layer.residency.work, layer.halves[wave % len(layer.halves)]
    with beside.copies():
        layer.operations.gather(
            layer.pool_rows_EB, block.rows_RB, work.stream_expert_E, None, work.num_streams,
            first=waves[wave], limit=block.num_rows,
        )  # fmt: skip
    return beside.mark()


def _compute_slots(
    layer: OffloadedLayer,
    beside: Beside,
    products: Products,
    loads: list[Mark],
    *,
    hits_first: bool,
) -> None:
    weights = layer.slots.weights
    if not hits_first:
        beside.wait(loads[0])
        products.compute(layer.residency.tables.slot_of_E, weights)
        return
    products.compute(layer.slot_of_AE[0], weights)
    for slot_of_E, mark in zip(layer.slot_of_AE[1:], loads, strict=False):
        beside.wait(mark)
        products.compute(slot_of_E, weights)


def _compute_wave(layer: OffloadedLayer, products: Products, block: Block, first: int) -> None:
    layer.operations.wave_map(
        layer.residency.work, first, layer.row_of_E, rows=block.num_rows
    )  # fmt: skip
    products.compute(layer.row_of_E, block.weights)
