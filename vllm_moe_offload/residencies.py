"""Residencies: those of all layers, whose slots open and close together.

Their tables lie side by side, so that a move of the boundary with the KV cache, which holds up a
step, takes a handful of launches however many layers there are.

Legend: L layers, E experts (the most of any layer), S slots (the most of any layer).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vllm_moe_offload.eviction import AdaptiveEviction
from vllm_moe_offload.kernels.resolve import (
    CLOSED,
    FOREVER,
    NEVER,
    NOWHERE,
    EvictionOrder,
    ResidencyTables,
)
from vllm_moe_offload.residency import Residency

ROW_MULTIPLE = 4
"""Entries of a row of a table, so that each begins on 16 bytes: kernels read those faster, and
there is one build of them for all layers."""


class Residencies:
    """One residency a layer, all slots open and empty.

    Args:
        num_experts: local experts of each layer.
        num_slots: slots of each layer.
        device: where the tables live.
        eviction: the policy that shares them, None for LRU.
        least_open: slots of every layer that never close, by default all of them.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        num_slots: Sequence[int],
        device: torch.device,
        eviction: AdaptiveEviction | None = None,
        *,
        least_open: int | None = None,
    ) -> None:
        layers = len(num_experts)

        def full(columns: int, value: int, dtype: torch.dtype) -> Tensor:
            padded = -(-columns // ROW_MULTIPLE) * ROW_MULTIPLE
            return torch.full((layers, padded), value, dtype=dtype, device=device)

        if eviction is None:
            self._slot_of_LE = full(max(num_experts), NOWHERE, torch.int32)
            self._open_L = None
        else:
            self._slot_of_LE = eviction.tables.slot_of_LE.fill_(NOWHERE)
            self._open_L = eviction.tables.slots_L
        self._expert_of_LS = full(max(num_slots), NOWHERE, torch.int32)
        self._stamp_LS = full(max(num_slots), NEVER, torch.int64)
        self._of_L = [
            Residency(self._tables(number, count, num_slots[number], eviction), least_open)
            for number, count in enumerate(num_experts)
        ]

    def _tables(
        self, layer: int, num_experts: int, num_slots: int, eviction: AdaptiveEviction | None
    ) -> ResidencyTables:
        order: EvictionOrder | None = eviction.order(layer) if eviction else None
        return ResidencyTables(
            slot_of_E=order.slot_of_E if order else self._slot_of_LE[layer, :num_experts],
            expert_of_S=self._expert_of_LS[layer, :num_slots],
            stamp_S=self._stamp_LS[layer, :num_slots],
            clock=torch.zeros(1, dtype=torch.int64, device=self._stamp_LS.device),
            order=order,
        )

    def __getitem__(self, layer: int) -> Residency:
        return self._of_L[layer]

    def __len__(self) -> int:
        return len(self._of_L)

    def __iter__(self) -> Iterator[Residency]:
        return iter(self._of_L)

    def open_from(self, first: int) -> None:
        """Use the slots from ``first`` on in every layer, and none before it.

        Slots that open are empty; experts in slots that close are resident no more. Queued on
        the device like any other work: what was queued before still reads a closed slot, what
        comes after neither reads nor fills it.

        Args:
            first: of layers that all have equally many slots.
        """
        before = self._of_L[0].first_open
        if first > before:
            # Slots before them are closed already, and nobody is in them.
            self._slot_of_LE.masked_fill_(self._slot_of_LE < first, NOWHERE)
            self._expert_of_LS[:, before:first] = CLOSED
            self._stamp_LS[:, before:first] = FOREVER
        else:
            self._expert_of_LS[:, first:before] = NOWHERE
            self._stamp_LS[:, first:before] = NEVER
        for residency in self._of_L:
            residency.first_open = first
        if self._open_L is not None:
            self._open_L.fill_(self._of_L[0].num_open)

    def empty(self) -> None:
        """Let no expert be resident: what the slots held is gone. Queued like ``open_from``."""
        for residency in self._of_L:
            residency.empty()

    def check_integrity(self) -> None:
        """Raise unless every layer is consistent, and what a policy hears of them is true."""
        for residency in self._of_L:
            residency.check_integrity()
        if self._open_L is not None:
            open_ = [residency.num_open for residency in self._of_L]
            assert self._open_L.tolist() == open_, "the policy counts on other slots"
