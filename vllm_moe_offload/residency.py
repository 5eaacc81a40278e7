"""Residency: which expert of a layer sits in which of its slots."""

import torch
from torch import Tensor

from vllm_moe_offload.kernels.resolve import (
    NEVER,
    NOWHERE,
    Counter,
    EvictionOrder,
    ResidencyTables,
    WorkList,
)


class Residency:
    """One layer's tables, its work list, and the invariant between them.

    Args:
        num_experts: local experts of the layer.
        num_slots: slots of the layer, from none to one for each expert.
        device: where the tables live.
        order: the layer's share of an eviction policy, None for LRU.
    """

    def __init__(
        self,
        num_experts: int,
        num_slots: int,
        device: torch.device,
        order: EvictionOrder | None = None,
    ) -> None:
        self.tables = ResidencyTables.empty(num_experts, num_slots, device, order)
        self.work = WorkList.empty(num_experts, device)

    @property
    def num_experts(self) -> int:
        """Local experts of the layer."""
        return self.tables.slot_of_E.numel()

    @property
    def num_slots(self) -> int:
        """Slots of the layer."""
        return self.tables.expert_of_S.numel()

    def counts(self) -> dict[str, int]:
        """Experts counted since the start by what happened to them; waits for the device."""
        values = self.work.counters.tolist()
        return {counter.name.lower(): values[counter] for counter in Counter}

    def num_resident(self) -> int:
        """Experts that have a slot now; waits for the device."""
        return int((self.tables.expert_of_S != NOWHERE).sum())

    def fill(self, experts: Tensor) -> None:
        """Give the first slots to these experts and empty the others; list the experts as loads.

        Args:
            experts: int32 on the device, each once, no more than there are slots. The first
                counts as the most recently used.
        """
        tables, work, count = self.tables, self.work, experts.numel()
        assert count <= self.num_slots, f"{count} experts, {self.num_slots} slots"
        slots = torch.arange(count, dtype=torch.int32, device=experts.device)
        tables.slot_of_E.fill_(NOWHERE)
        tables.expert_of_S.fill_(NOWHERE)
        tables.stamp_S.fill_(NEVER)
        # As if the experts had been read in the last steps, one in each.
        tables.clock.add_(count)
        tables.slot_of_E[experts.long()] = slots
        tables.expert_of_S[:count] = experts
        tables.stamp_S[:count] = tables.clock - 1 - slots
        work.load_expert_E[:count] = experts
        work.load_slot_E[:count] = slots
        work.num_loads.fill_(count)
        work.counters[Counter.SURPLUS] += count

    def check_integrity(self) -> None:
        """Raise unless the two maps are inverse and the counters add up."""
        slot_of_E, expert_of_S = self.tables.slot_of_E.cpu(), self.tables.expert_of_S.cpu()
        experts = torch.nonzero(slot_of_E != NOWHERE).flatten()
        slots = torch.nonzero(expert_of_S != NOWHERE).flatten()
        assert experts.numel() == slots.numel(), "an expert or a slot is mapped twice"
        assert torch.equal(expert_of_S[slot_of_E[experts].long()].long(), experts)
        assert torch.equal(slot_of_E[expert_of_S[slots].long()].long(), slots)
        assert bool((self.tables.stamp_S < self.tables.clock).all()), "a slot is ahead of time"
        counts = self.counts()
        assert counts["active"] == counts["hits"] + counts["loads"] + counts["streams"]
