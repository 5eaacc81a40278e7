"""What an engine has counted, all layers together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vllm_moe_offload.counts import LayerCounts


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
    stall_seconds: float = 0.0
    lent_bytes: int = 0

    @classmethod
    def of(
        cls,
        counts: Sequence[LayerCounts],
        *,
        layers: int,
        experts_in_pool: int,
        pool_bytes: int,
        slot_bytes: int,
        lent_bytes: int,
        staging_bytes: int,
    ) -> "EngineStats":
        """Add up the counts of all layers; what they do not count is given."""
        demand_bytes = sum(layer.demand_bytes for layer in counts)
        wave_bytes = sum(layer.wave_bytes for layer in counts)
        prefetch_bytes = sum(layer.prefetch_bytes for layer in counts)
        return cls(
            layers=layers,
            experts_in_pool=experts_in_pool,
            slots=sum(layer.slots for layer in counts),
            resident=sum(layer.resident for layer in counts),
            pool_bytes=pool_bytes,
            slot_bytes=slot_bytes,
            lent_bytes=lent_bytes,
            staging_bytes=staging_bytes,
            active=sum(layer.active for layer in counts),
            hits=sum(layer.hits for layer in counts),
            misses=sum(layer.misses for layer in counts),
            streamed=sum(layer.streams for layer in counts),
            demand_bytes=demand_bytes,
            wave_bytes=wave_bytes,
            bytes_moved=demand_bytes + wave_bytes + prefetch_bytes,
            prefetch_bytes=prefetch_bytes,
            prefetched=sum(layer.prefetched for layer in counts),
            prefetch_hits=sum(layer.prefetch_hits for layer in counts),
            found=sum(layer.found for layer in counts),
            foreseeable=sum(layer.foreseeable for layer in counts),
            transfer_seconds=sum(layer.transfer_seconds for layer in counts),
            stall_seconds=sum(layer.stall_seconds for layer in counts),
        )

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
