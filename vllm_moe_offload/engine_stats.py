"""What an engine has counted, all layers together."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start, in experts and bytes; ``active = hits + misses``.

    See ``LayerCounts`` for what each of them counts. ``slots`` and ``slot_bytes`` are those in use,
    of which ``lent_bytes`` are borrowed from the KV cache now.
    """

    layers: int
    experts_in_pool: int
    slots: int
    resident: int
    pool_bytes: int
    slot_bytes: int
    staging_bytes: int
    active: int
    hits: int
    misses: int
    streamed: int
    demand_bytes: int
    wave_bytes: int
    bytes_moved: int
    prefetch_bytes: int = 0
    prefetched: int = 0
    prefetch_hits: int = 0
    found: int = 0
    foreseeable: int = 0
    transfer_seconds: float = 0.0
    lent_bytes: int = 0

    def as_dict(self) -> dict[str, float]:
        """All fields by name."""
        return asdict(self)

    def __add__(self, other: "EngineStats") -> "EngineStats":
        """Add up the engines of several models or workers."""
        mine, theirs = asdict(self), asdict(other)
        return EngineStats(**{name: mine[name] + theirs[name] for name in mine})

    @property
    def hit_ratio(self) -> float:
        """Share of the active experts that were in a slot."""
        return self.hits / self.active if self.active else 0.0

    @property
    def precision(self) -> float | None:
        """Share of what was brought in ahead that a step then read; None if nothing was."""
        return self.prefetch_hits / self.prefetched if self.prefetched else None

    @property
    def coverage(self) -> float | None:
        """Share of what was asked for that had been predicted; None without predictions."""
        return self.found / self.foreseeable if self.foreseeable else None
