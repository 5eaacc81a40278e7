"""Sweep: a step over so many tokens that every expert without a slot is streamed, in order.

What streams follows from residency alone, not from routing, and a sweep leaves residency as it
is. So one look at the tables at the first layer gives the whole step's list of copies. The copy
engine works through it beside the computation, a few staging blocks ahead of it and across
layers: the first experts of the next layer are on their way before its router has run. Where the
next step is known to be a sweep too, its first experts are on their way before it begins.

Legend: L layers, E local experts of a layer, W waves of a step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vllm_moe_offload.kernels import dispatch
from vllm_moe_offload.kernels.resolve import NOWHERE, Counter
from vllm_moe_offload.offloaded_layer import OffloadedLayer
from vllm_moe_offload.products import Products


@dataclass(frozen=True)
class Wave:
    """Experts of one layer that pass through a staging block together, ascending."""

    layer: int
    experts: tuple[int, ...]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Runs of neighbouring experts as (first expert, first row, length)."""
        start = 0
        for row in range(1, len(self.experts) + 1):
            if row == len(self.experts) or self.experts[row] != self.experts[row - 1] + 1:
                yield self.experts[start], start, row - start
                start = row


def plan_waves(
    slot_of_LE: Sequence[Sequence[int]], block_rows: Sequence[int], first_layer: int
) -> list[Wave]:
    """Cut every layer's experts without a slot into waves.

    Args:
        slot_of_LE: slot of each expert by layer, -1 for none.
        block_rows: rows of a staging block by layer.
        first_layer: layers before this one are left out.
    """
    waves: list[Wave] = []
    for layer in range(first_layer, len(slot_of_LE)):
        absent = [e for e, slot in enumerate(slot_of_LE[layer]) if slot == NOWHERE]
        # A layer without absent experts may have rows larger than a block.
        rows = max(1, block_rows[layer])
        waves += [
            Wave(layer, tuple(absent[start : start + rows]))
            for start in range(0, len(absent), rows)
        ]
    return waves


class _Copies:
    """Order between copies and computation where both are one sequence, as on a CPU."""

    def follow_computation(self) -> None:
        """Start no copy before what has been queued to compute."""

    @contextmanager
    def into(self, block: int) -> Iterator[None]:
        """Queue the copies of the context into a block, after its last use."""
        del block
        yield

    def wait(self, block: int) -> None:
        """Compute nothing more before a block's copies are there."""

    def free(self, block: int) -> None:
        """Note that what has been queued so far is the last that reads a block."""

    def drain(self) -> None:
        """Compute nothing more before all copies are there."""


class _StreamCopies(_Copies):
    """The same order between the copy engine's stream and the current one."""

    def __init__(self, device: torch.device, num_blocks: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._ready = [torch.cuda.Event() for _ in range(num_blocks)]
        self._freed = [torch.cuda.Event() for _ in range(num_blocks)]

    def follow_computation(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def into(self, block: int) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            # An event that was never recorded is not waited for.
            self._stream.wait_event(self._freed[block])
            yield
            self._ready[block].record(self._stream)

    def wait(self, block: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._ready[block])

    def free(self, block: int) -> None:
        self._freed[block].record(torch.cuda.current_stream(self._device))

    def drain(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _copies(device: torch.device, num_blocks: int) -> _Copies:
    return _StreamCopies(device, num_blocks) if device.type == "cuda" else _Copies()


class Sweep:
    """Runs the layers of one step after the other while the copy engine stays ahead.

    Args:
        layers: all layers of the model, in order of execution.
        pool_rows: the pool rows of each layer in host memory, pinned.
        device: where the layers are computed.
    """

    def __init__(
        self, layers: Sequence[OffloadedLayer], pool_rows: Sequence[Tensor], device: torch.device
    ) -> None:
        self._layers = layers
        self._pool_rows = pool_rows
        self._device = device
        self._blocks = len(layers[0].blocks)
        self._copies = _copies(device, self._blocks)
        self._waves: list[Wave] = []
        self._row_of_WE = torch.empty(0)
        self._issued = self._done = 0
        self._next_layer = len(layers)
        self._whole = False

    def begin(self) -> None:
        """Start the copies of a step before its first layer runs."""
        if self._next_layer != 0:
            self._start(0)

    def follow(self) -> None:
        """Start the copies of the next step, after a whole one and with nothing in between.

        A sweep leaves residency as it is, so the plan of the last one still holds.
        """
        if self._whole and self._next_layer == len(self._layers):
            self._issued = self._done = self._next_layer = 0
            self._issue_free_blocks()

    def run(self, layer: int, x_TH: Tensor, weight_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Compute a layer; the first of a step, or one out of turn, starts a new sweep.

        Returns:
            [T, H] of the type of ``x_TH``.
        """
        if layer != self._next_layer:
            self._start(layer)
        part = self._layers[layer]
        products = self._compute_slots(part, x_TH, weight_TK, ids_TK)
        moved = 0
        while self._done < len(self._waves) and self._waves[self._done].layer == layer:
            moved += len(self._waves[self._done].experts)
            self._compute_wave(part, products)
        self._count(part, ids_TK, products, moved)
        self._next_layer = layer + 1
        return products.total()

    def rehearse(self, layer: int, x_TH: Tensor, weight_TK: Tensor, ids_TK: Tensor) -> Tensor:
        """Launch what ``run`` launches, for ids that are all inactive: nothing moves or counts."""
        part = self._layers[layer]
        products = self._compute_slots(part, x_TH, weight_TK, ids_TK)
        products.compute(part.row_of_E.fill_(NOWHERE), part.blocks[0].weights)
        self._count(part, ids_TK, products, moved=0)
        return products.total()

    def settle(self) -> None:
        """Let the current stream wait for copies of a sweep that was left half-way.

        What they brought is of no use, but it was moved.
        """
        for wave in self._waves[self._done : self._issued]:
            counters = self._layers[wave.layer].residency.work.counters
            counters[Counter.SURPLUS] += len(wave.experts)
        if self._done < self._issued:
            self._copies.drain()
        self._waves, self._next_layer, self._whole = [], len(self._layers), False
        self._issued = self._done = 0

    def _start(self, layer: int) -> None:
        self.settle()
        # The one wait for the device in a step of many milliseconds.
        slot_of_LE = _read([part.residency.tables.slot_of_E for part in self._layers])
        for number in range(layer, len(self._layers)):
            self._fill_empty_slots(number, slot_of_LE[number])
        rows = [part.blocks[0].num_rows for part in self._layers]
        self._waves = plan_waves(slot_of_LE, rows, layer)
        self._row_of_WE = self._maps().to(self._device, non_blocking=True)
        self._copies.follow_computation()
        self._next_layer, self._whole = layer, layer == 0
        self._issue_free_blocks()

    def _fill_empty_slots(self, number: int, slot_of_E: list[int]) -> None:
        """Give slots that hold nothing to the first experts that have none."""
        part = self._layers[number]
        used = set(slot_of_E)
        open_slots = range(part.residency.first_open, part.residency.num_slots)
        empty = [slot for slot in open_slots if slot not in used]
        absent = [e for e, slot in enumerate(slot_of_E) if slot == NOWHERE]
        pairs = list(zip(absent, empty, strict=False))
        if not pairs:
            return
        for expert, slot in pairs:
            slot_of_E[expert] = slot
            part.slots.rows_RB[slot].copy_(self._pool_rows[number][expert], non_blocking=True)
        experts, slots = torch.tensor(pairs, dtype=torch.int32).to(self._device).unbind(1)
        tables = part.residency.tables
        tables.slot_of_E[experts.long()] = slots
        tables.expert_of_S[slots.long()] = experts
        part.residency.work.counters[Counter.SURPLUS] += len(pairs)

    def _maps(self) -> Tensor:
        """Staging row of each expert in each wave, int32 [W, E] in pinned memory."""
        experts = max(part.spec.num_experts for part in self._layers)
        maps = torch.full((len(self._waves), experts), NOWHERE, dtype=torch.int32)
        for number, wave in enumerate(self._waves):
            maps[number, list(wave.experts)] = torch.arange(len(wave.experts), dtype=torch.int32)
        return maps.pin_memory() if self._device.type == "cuda" else maps

    def _issue_free_blocks(self) -> None:
        while self._issued < min(len(self._waves), self._done + self._blocks):
            self._issue(self._issued)
            self._issued += 1

    def _issue(self, number: int) -> None:
        """Queue the copies of a wave behind the last use of its block."""
        wave, block = self._waves[number], number % self._blocks
        target = self._layers[wave.layer].blocks[block].rows_RB
        source = self._pool_rows[wave.layer]
        with self._copies.into(block):
            for expert, row, length in wave.runs():
                target[row : row + length].copy_(
                    source[expert : expert + length], non_blocking=True
                )

    @staticmethod
    def _compute_slots(
        part: OffloadedLayer, x_TH: Tensor, weight_TK: Tensor, ids_TK: Tensor
    ) -> Products:
        products = Products(part, x_TH, weight_TK, ids_TK)
        if products.lists is not None:
            dispatch.dispatch(ids_TK, products.lists)
        products.compute(part.residency.tables.slot_of_E, part.slots.weights)
        return products

    def _compute_wave(self, part: OffloadedLayer, products: Products) -> None:
        number = self._done
        block = number % self._blocks
        self._copies.wait(block)
        row_of_E = self._row_of_WE[number, : part.spec.num_experts]
        products.compute(row_of_E, part.blocks[block].weights)
        self._copies.free(block)
        self._done += 1
        self._issue_free_blocks()

    @staticmethod
    def _count(part: OffloadedLayer, ids_TK: Tensor, products: Products, moved: int) -> None:
        tables, work = part.residency.tables, part.residency.work
        part.operations.tally(
            ids_TK, tables.slot_of_E, work.counters, moved, dispatch=products.lists
        )


def _read(tables: Sequence[Tensor]) -> list[list[int]]:
    """Bring tables to the host in one transfer."""
    flat = torch.cat(list(tables)).tolist()
    ends = [0]
    for table in tables:
        ends.append(ends[-1] + table.numel())
    return [flat[start:end] for start, end in pairwise(ends)]
