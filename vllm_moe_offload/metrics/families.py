"""The metric set: Prometheus families made of the workers' pages."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.metrics.page import Page, Worker, read_pages

PREFIX = "vllm_moe_offload_"

_WORKER = ("model_name", "engine", "worker")
_LAYER = (*_WORKER, "layer")

Family = CounterMetricFamily | GaugeMetricFamily

_LAYER_COUNTERS: dict[str, tuple[str, Callable[[LayerCounts], float]]] = {
    "hits": ("Active experts that were in a slot.", lambda layer: layer.hits),
    "misses": ("Active experts that were not in a slot.", lambda layer: layer.misses),
    "prefetched": ("Experts brought into a slot ahead of a step.", lambda layer: layer.prefetched),
    "prefetch_hits": ("Those of them that the step then read.", lambda layer: layer.prefetch_hits),
    "predicted": ("Experts predicted for a step.", lambda layer: layer.guessed),
    "predicted_hits": ("Those of them that the step then read.", lambda layer: layer.found),
    "foreseeable": (
        "Active experts of steps that had a prediction.",
        lambda layer: layer.foreseeable,
    ),
    "stall_seconds": (
        "How long steps stood still for experts, at most: the transfer seconds of demand and "
        "waves, as if computation had hidden none of them.",
        lambda layer: layer.stall_seconds,
    ),
}

_CAUSES: dict[str, Callable[[LayerCounts], int]] = {
    "demand": lambda layer: layer.demand_bytes,
    "wave": lambda layer: layer.wave_bytes,
    "prefetch": lambda layer: layer.prefetch_bytes,
}

_LAYER_GAUGES: dict[str, tuple[str, Callable[[LayerCounts], float | None]]] = {
    "resident_experts": ("Experts that are in a slot.", lambda layer: layer.resident),
    "slots": ("Slots on the GPU.", lambda layer: layer.slots),
    "experts": ("Experts in the host pool.", lambda layer: layer.experts),
    "prefetch_precision": (
        "Share of what was brought in ahead that the step then read, since the start; absent if "
        "nothing was.",
        lambda layer: layer.precision,
    ),
    "prefetch_coverage": (
        "Share of the active experts that had been predicted, since the start; absent without "
        "predictions.",
        lambda layer: layer.coverage,
    ),
}

_WORKER_GAUGES: dict[str, tuple[str, Callable[[Page], float | None]]] = {
    "pool_bytes": ("Host memory of all experts.", lambda page: page.pool_bytes),
    "slot_bytes": ("GPU memory of all slots.", lambda page: page.slot_bytes),
    "lent_bytes": (
        "What of it is borrowed from the KV cache now.",
        lambda page: page.lent_bytes,
    ),
    "boundary_block": (
        "First block of the KV cache that experts hold now; absent where it is not shared.",
        lambda page: page.boundary_block,
    ),
    "kv_blocks": (
        "Blocks of a KV cache that is shared; absent where it is not.",
        lambda page: page.kv_blocks,
    ),
    "staging_bytes": ("GPU memory of staging.", lambda page: page.staging_bytes),
    "pcie_bytes_per_second": (
        "What the GPU's PCIe link carries in one direction; absent if it is not known.",
        lambda page: page.pcie_bytes_per_s,
    ),
    "snapshot_timestamp_seconds": ("When the counters were read.", lambda page: page.time),
}


class OffloadCollector(Collector):
    """Reads the pages whenever Prometheus asks.

    Args:
        pages: where they come from.
    """

    def __init__(self, pages: Callable[[], Sequence[Page]] = read_pages) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        """All families, none without a worker that offloads."""
        pages = self._pages()
        return list(families(pages)) if pages else []

    def describe(self) -> Iterable[Metric]:
        """All families without samples: registering reads no page."""
        return list(families([]))


def families(pages: Sequence[Page]) -> Iterator[Metric]:
    """Make every family of the metric set."""
    for name, (text, count) in _LAYER_COUNTERS.items():
        family = CounterMetricFamily(PREFIX + name, text, labels=_LAYER)
        yield _by_layer(family, pages, (), count)
    moved = CounterMetricFamily(
        f"{PREFIX}bytes",
        "Bytes moved to the GPU from a tier, by cause: for a token that waited (demand), "
        "through staging and by sweeps (wave), or ahead of a step (prefetch).",
        labels=(*_LAYER, "tier", "cause"),
    )
    needed = CounterMetricFamily(
        f"{PREFIX}transfer_seconds",
        "What the link needed for these bytes: experts by the time that one took when it was "
        "measured at the start.",
        labels=(*_LAYER, "tier", "cause"),
    )
    for cause, count in _CAUSES.items():
        _by_layer(moved, pages, ("host", cause), count)
        _by_layer(needed, pages, ("host", cause), partial(_seconds, count))
    yield moved
    yield needed
    for name, (text, value_of) in _LAYER_GAUGES.items():
        yield _by_layer(GaugeMetricFamily(PREFIX + name, text, labels=_LAYER), pages, (), value_of)
    for name, (text, value) in _WORKER_GAUGES.items():
        gauge = GaugeMetricFamily(PREFIX + name, text, labels=_WORKER)
        for page in pages:
            if (amount := value(page)) is not None:
                gauge.add_metric(_labels(page.worker), amount)
        yield gauge
    policy = InfoMetricFamily(f"{PREFIX}policy", "The policies in force.", labels=_WORKER)
    for page in pages:
        policy.add_metric(_labels(page.worker), page.policies)
    yield policy


def _seconds(count: Callable[[LayerCounts], int], layer: LayerCounts) -> float:
    return layer.seconds_for(count(layer))


def _by_layer(
    family: Family,
    pages: Sequence[Page],
    labels: tuple[str, ...],
    value: Callable[[LayerCounts], float | None],
) -> Family:
    for page in pages:
        for layer in page.layers:
            if (amount := value(layer)) is not None:
                family.add_metric([*_labels(page.worker), layer.layer, *labels], amount)
    return family


def _labels(worker: Worker) -> list[str]:
    return [worker.model, str(worker.engine), str(worker.rank)]
