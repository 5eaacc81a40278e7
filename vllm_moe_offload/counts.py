"""What one layer has counted, as plain numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerCounts:
    """One layer's counts since the start, in experts; ``active = hits + misses``."""

    layer: str
    """Name of the layer in the model."""
    experts: int
    slots: int
    row_bytes: int
    resident: int
    active: int
    hits: int
    loads: int
    """Brought into a slot because a token asked for them."""
    streams: int
    """Asked for, but without a slot: they passed through staging in waves."""
    surplus: int
    """Moved by a sweep though nobody asked for them."""
    prefetched: int = 0
    """Brought into a slot ahead of a step."""
    prefetch_hits: int = 0
    """Those of them that the step then read."""
    guessed: int = 0
    """Predicted for steps that had a prediction."""
    found: int = 0
    """Those of them that the step then read."""
    foreseeable: int = 0
    """Active experts of steps that had a prediction."""
    row_seconds: float = 0.0
    """What one expert takes from the pool to the GPU, as measured at the start."""
    is_held: bool = False
    """Whether the GPU holds all rows; what is brought into a slot then crosses no link."""

    @property
    def misses(self) -> int:
        """Active experts that were not in a slot."""
        return self.loads + self.streams

    @property
    def demand_bytes(self) -> int:
        """Moved into slots for tokens that waited."""
        return self.loads * self._link_bytes

    @property
    def wave_bytes(self) -> int:
        """Moved by waves through staging, and into empty slots on the way."""
        return (self.streams + self.surplus) * self._link_bytes

    @property
    def prefetch_bytes(self) -> int:
        """Moved into slots ahead of steps."""
        return self.prefetched * self._link_bytes

    @property
    def _link_bytes(self) -> int:
        return 0 if self.is_held else self.row_bytes

    @property
    def transfer_seconds(self) -> float:
        """What the link needed for all that was moved, by ``row_seconds``."""
        moved = self.demand_bytes + self.wave_bytes + self.prefetch_bytes
        return self.seconds_for(moved)

    @property
    def stall_seconds(self) -> float:
        """How long steps stood still at most: what they asked for, as if nothing were hidden."""
        return self.seconds_for(self.demand_bytes + self.wave_bytes)

    def seconds_for(self, num_bytes: float) -> float:
        """What the link needs for so many bytes of experts."""
        return num_bytes / self.row_bytes * self.row_seconds

    @property
    def precision(self) -> float | None:
        """Share of what was brought in ahead that the step then read; None if nothing was."""
        return self.prefetch_hits / self.prefetched if self.prefetched else None

    @property
    def coverage(self) -> float | None:
        """Share of what was asked for that had been predicted; None without predictions."""
        return self.found / self.foreseeable if self.foreseeable else None

    @property
    def is_whole(self) -> bool:
        """Whether no step was caught between two counters."""
        return self.active == self.hits + self.misses
