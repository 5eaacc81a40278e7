"""What has happened between two readings. Pure."""

from dataclasses import dataclass
from typing import Self

from vllm_moe_offload.watch.sample import LayerSample, Sample

_LAG_S = 1.0
"""A worker that works reads its counters so often."""


@dataclass(frozen=True)
class Change:
    """Rates a second, and hit ratios; a ratio is None where no expert was active."""

    seconds: float
    hit_ratio: float | None
    hit_ratio_by_layer: dict[str, float | None]
    bytes_per_s_by_cause: dict[str, float]
    transfer_share: float
    """Share of the time that the links were busy, added up over all workers."""
    generated_per_s: float
    prompt_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """For all causes."""
        return sum(self.bytes_per_s_by_cause.values())

    @classmethod
    def between(cls, before: Sample, after: Sample) -> Self | None:
        """Subtract two readings; None if the server has started anew between them."""
        seconds = after.time - before.time
        # Counters are younger or older than their reading by this much, so that their own times
        # give the better rate, unless the server had stood still.
        counted = min(after.counted_at - before.counted_at, seconds + _LAG_S)
        if seconds <= 0 or before.layers.keys() != after.layers.keys() or _restarted(before, after):
            return None
        pairs = {layer: (before.layers[layer], after.layers[layer]) for layer in after.layers}
        hits = {layer: new.hits - old.hits for layer, (old, new) in pairs.items()}
        misses = {layer: new.misses - old.misses for layer, (old, new) in pairs.items()}
        return cls(
            seconds=seconds,
            hit_ratio=ratio(sum(hits.values()), sum(misses.values())),
            hit_ratio_by_layer={layer: ratio(hits[layer], misses[layer]) for layer in pairs},
            bytes_per_s_by_cause={
                cause: (count - before.bytes_by_cause.get(cause, 0)) / counted if counted else 0.0
                for cause, count in after.bytes_by_cause.items()
            },
            transfer_share=(
                (after.transfer_seconds - before.transfer_seconds) / counted if counted else 0.0
            ),
            generated_per_s=(after.generated_tokens - before.generated_tokens) / seconds,
            prompt_per_s=(after.prompt_tokens - before.prompt_tokens) / seconds,
        )


def ratio(hits: float, misses: float) -> float | None:
    """Share of the active experts that were in a slot."""
    return hits / (hits + misses) if hits + misses else None


def hit_ratio(layers: list[LayerSample]) -> float | None:
    """Hit ratio of layers since the start."""
    return ratio(sum(layer.hits for layer in layers), sum(layer.misses for layer in layers))


def _restarted(before: Sample, after: Sample) -> bool:
    def counters(sample: Sample) -> list[float]:
        counts = [count for layer in sample.layers.values() for count in (layer.hits, layer.misses)]
        return [*counts, sample.generated_tokens, sample.prompt_tokens]

    return any(new < old for old, new in zip(counters(before), counters(after), strict=True))
