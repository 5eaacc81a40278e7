"""Residency: which expert of a layer sits in which of its slots."""

import torch
from torch import Tensor

from vllm_moe_offload.kernels.resolve import (
    CLOSED,
    FOREVER,
    NEVER,
    NOWHERE,
    Counter,
    ResidencyTables,
    WorkList,
)


class Residency:
    """One layer's tables, its work list, and the invariant between them.

    Args:
        tables: of the layer, with nobody resident and all slots open.
        least_open: slots that never close, by default all of them; a captured graph counts on
            these.
    """

    def __init__(self, tables: ResidencyTables, least_open: int | None = None) -> None:
        self.tables = tables
        self.work = WorkList.empty(self.num_experts, tables.clock.device)
        self.least_open = self.num_slots if least_open is None else least_open
        self.first_open = 0
        """Slots before it are closed; moved for all layers at once, see ``Residencies``."""

    @property
    def num_experts(self) -> int:
        """Local experts of the layer."""
        return self.tables.slot_of_E.numel()

    @property
    def num_slots(self) -> int:
        """Slots of the layer."""
        return self.tables.expert_of_S.numel()

    @property
    def num_open(self) -> int:
        """Slots that may hold an expert now."""
        return self.num_slots - self.first_open

    def counts(self) -> dict[str, int]:
        """Experts counted since the start by what happened to them; waits for the device."""
        values = self.work.counters.tolist()
        return {counter.name.lower(): values[counter] for counter in Counter}

    def num_resident(self) -> int:
        """Experts that have a slot now; waits for the device."""
        return int((self.tables.expert_of_S >= 0).sum())

    def empty(self) -> None:
        """Let no expert be resident: what the slots held is gone."""
        tables = self.tables
        tables.slot_of_E.fill_(NOWHERE)
        tables.expert_of_S[self.first_open :] = NOWHERE
        tables.stamp_S[self.first_open :] = NEVER

    def fill(self, experts: Tensor) -> None:
        """Give the first open slots to these experts, empty the others, list the experts as loads.

        Args:
            experts: int32 on the device, each once, no more than there are slots. The first
                counts as the most recently used.
        """
        tables, work, count, first = self.tables, self.work, experts.numel(), self.first_open
        assert count <= self.num_open, f"{count} experts, {self.num_open} slots"
        rank = torch.arange(count, dtype=torch.int32, device=experts.device)
        slots = first + rank
        self.empty()
        # As if the experts had been read in the last steps, one in each.
        tables.clock.add_(count)
        tables.slot_of_E[experts.long()] = slots
        tables.expert_of_S[first : first + count] = experts
        tables.stamp_S[first : first + count] = tables.clock - 1 - rank
        work.load_expert_E[:count] = experts
        work.load_slot_E[:count] = slots
        work.num_loads.fill_(count)
        work.counters[Counter.SURPLUS] += count

    def check_integrity(self) -> None:
        """Raise unless the two maps are inverse and the counters add up."""
        slot_of_E, expert_of_S = self.tables.slot_of_E.cpu(), self.tables.expert_of_S.cpu()
        experts = torch.nonzero(slot_of_E != NOWHERE).flatten()
        slots = torch.nonzero(expert_of_S >= 0).flatten()
        assert experts.numel() == slots.numel(), "an expert or a slot is mapped twice"
        assert torch.equal(expert_of_S[slot_of_E[experts].long()].long(), experts)
        assert torch.equal(slot_of_E[expert_of_S[slots].long()].long(), slots)
        closed = self.tables.expert_of_S == CLOSED
        assert int(closed.sum()) == int(closed[: self.first_open].sum()) == self.first_open
        assert bool((self.tables.stamp_S[closed] == FOREVER).all()), "a closed slot may be taken"
        ahead = ~closed & (self.tables.stamp_S >= self.tables.clock)
        assert not bool(ahead.any()), "a slot is ahead of time"
        counts = self.counts()
        assert counts["active"] == counts["hits"] + counts["loads"] + counts["streams"]
