"""Eviction: what the adaptive policy knows of all layers, beside the residency of each.

Legend: L layers, E experts (the most of any layer), R orders.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.candidates import (
    AS_LRU,
    CANDIDATES,
    EXPERT_BITS,
    FIRST,
    HIT,
    LRU,
    MAX_AGE,
    SEQUEL_UNIT,
    SOON,
)
from vllm_moe_offload.kernels.learn import ORDERS, AdaptiveTables, Standing
from vllm_moe_offload.kernels.operations import Operations, operations_for
from vllm_moe_offload.kernels.resolve import EvictionOrder


class AdaptiveEviction:
    """Learns from every step which residents to let go in the next, see ``kernels.learn``.

    Args:
        num_experts: local experts of each layer.
        num_slots: slots of each layer, all of them open.
        device: where the tables live.
        operations: what runs there.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        num_slots: Sequence[int],
        device: torch.device,
        operations: Operations,
    ) -> None:
        self.tables = AdaptiveTables.empty(num_experts, num_slots, device)
        self._num_experts, self._num_slots = list(num_experts), list(num_slots)
        self._learn = operations.learn

    def order(self, layer: int) -> EvictionOrder:
        """What the residency of a layer shares with the policy."""
        return self.tables.order(layer, self._num_experts[layer])

    def learn(self) -> None:
        """Take in a step that all layers have resolved; never waits for the device."""
        self._learn(self.tables)

    def forget(self) -> None:
        """Start to learn anew; residency stays."""
        self.tables.forget()

    def note_fill(self, layer: int, experts: torch.Tensor) -> None:
        """Note that these experts, and no others, were put into the slots of a layer.

        Args:
            layer: its number.
            experts: int32 on the device. As in residency the first counts as the most recently
                used, and the candidates' caches are filled alike.
        """
        age = 1 + torch.arange(experts.numel(), dtype=torch.int32, device=experts.device)
        rank_RE = self.tables.rank_LRE[layer]
        rank_RE[LRU, experts.long()] = ((MAX_AGE - age) << EXPERT_BITS) | experts
        rank_RE[AS_LRU] = rank_RE[LRU]
        self.tables.held_LE[layer] = 0

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """What a warm start keeps: what was learned, but not who is resident; waits for the device.

        Another thread may ask.
        """
        return {name: np.array(getattr(self.tables, name).cpu()) for name in _KEPT}

    def from_arrays(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what a warm start kept.

        Raises:
            OffloadError: the arrays are damaged or belong to another model.
        """
        found = {name: _checked(arrays, name, getattr(self.tables, name)) for name in _KEPT}
        standing = found["standing"]
        # There may be fewer slots by now.
        ceiling = HIT * (sum(self._num_slots) + self.tables.num_layers)
        standing[Standing.BALANCE] = min(standing[Standing.BALANCE], ceiling)
        standing[Standing.TURN] %= self.tables.num_layers
        for name, array in found.items():
            getattr(self.tables, name).copy_(torch.from_numpy(array))

    def check_integrity(self) -> None:
        """Raise unless ranks, LRU's cache, averages and the balance are such as can be."""
        tables = self.tables
        expert_E = torch.arange(tables.num_experts, device=tables.rank_LRE.device)
        ranked = tables.rank_LRE & ((1 << EXPERT_BITS) - 1)
        assert bool((ranked == expert_E).all()), "a rank is not that of its expert"
        assert bool((tables.rank_LRE >= 0).all()), "a rank is below that of an empty slot"
        # They learn of slots that have closed with the next step, as does the balance below.
        slots_L = torch.tensor(self._num_slots, device=tables.held_LE.device)
        for candidate in range(CANDIDATES):
            count_L = ((tables.held_LE >> candidate) & 1).sum(1)
            assert bool((count_L <= slots_L).all()), "a candidate's cache outgrows the slots"
        assert not (tables.held_LE >> CANDIDATES).any(), "a cache of no candidate"
        as_lru_LE = tables.rank_LRE[:, LRU] + FIRST * ((tables.held_LE >> LRU) & 1)
        assert torch.equal(tables.rank_LRE[:, AS_LRU].long(), as_lru_LE.long())
        for held_E, experts in zip(tables.held_LE, self._num_experts, strict=True):
            assert not held_E[experts:].any(), "an expert is held that the layer does not have"
        most = SEQUEL_UNIT * len(SOON)
        sequel = tables.sequel_LEE
        assert bool(((sequel >= 0) & (sequel <= most)).all()), "a sequel is out of range"
        assert not tables.expected_LE.any(), "what was expected is left over"
        average = tables.average_LFE
        assert bool(((average >= 0) & (average <= 1)).all()), "an average is out of range"
        assert bool(((tables.row_L >= 0) & (tables.row_L < ORDERS)).all()), "there is no such order"
        ceiling = HIT * (sum(self._num_slots) + tables.num_layers)
        assert int(tables.standing[Standing.BALANCE]) <= ceiling, "the balance is above its ceiling"


def make_eviction(
    policy: str,
    num_experts: Sequence[int],
    num_slots: Sequence[int],
    least_open: int | None,
    device: torch.device,
) -> AdaptiveEviction | None:
    """What the option asks for; None for LRU, and where nobody is ever evicted.

    Args:
        policy: the option.
        num_experts: local experts of each layer.
        num_slots: slots of each layer.
        least_open: slots of every layer that never close, None if none ever does.
        device: where the tables live.
    """
    open_ = num_slots if least_open is None else [least_open] * len(num_slots)
    # Where all experts have slots, or none has, nobody loses one.
    evicts = any(s > 0 and o < e for e, s, o in zip(num_experts, num_slots, open_, strict=True))
    if policy != "adaptive" or not evicts:
        return None
    return AdaptiveEviction(num_experts, num_slots, device, operations_for(device))


_KEPT = {
    "average_LFE": (0, 1),
    "sequel_LEE": (0, SEQUEL_UNIT * len(SOON)),
    "votes_M": (0, math.inf),
    "standing": (-math.inf, math.inf),
}
"""Tables that outlast a restart, with the least and the most that they hold."""


def _checked(arrays: Mapping[str, NDArray[Any]], name: str, table: torch.Tensor) -> NDArray[Any]:
    """Return a table of a warm start.

    Raises:
        OffloadError: it is not there, has another shape, or holds something else.
    """
    array, (least, most) = arrays.get(name), _KEPT[name]
    expected = table.cpu().numpy()
    if array is None or array.shape != expected.shape or array.dtype != expected.dtype:
        problem = "there is no such table of this model's layers and experts"
    elif not (np.isfinite(array) & (array >= least) & (array <= most)).all():
        problem = "it holds something else than what was learned"
    elif name == "standing" and not 0 <= array[Standing.LEADER] < CANDIDATES:
        problem = "it follows an order that does not exist"
    else:
        return array.copy()
    raise OffloadError("policy", name, f"of the warm start {problem}", "Delete the file")
