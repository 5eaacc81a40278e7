"""One reading of a server's ``/metrics``."""

import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Self
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.metrics.families import PREFIX

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class LayerSample:
    """One layer, all workers together."""

    hits: float
    misses: float
    resident: float
    slots: float


@dataclass(frozen=True)
class Sample:
    """All of a server's workers and models together, counted since they started.

    ``time`` is the reader's, in seconds. ``counted_at`` is when the worker that is behind all
    others had its counters read, in seconds since the epoch. ``link_bytes_per_s`` adds up all GPUs,
    None if the link of one is not known.
    """

    time: float
    counted_at: float
    layers: Mapping[str, LayerSample]
    bytes_by_cause: Mapping[str, float]
    transfer_seconds: float
    """What the links of all workers needed for what was moved."""
    prefetched: float
    prefetch_hits: float
    predicted_hits: float
    foreseeable: float
    slot_bytes: float
    lent_bytes: float
    boundary_block: float
    """Added up over the workers that share their KV cache, like the blocks below."""
    kv_blocks: float
    workers: int
    link_bytes_per_s: float | None
    policies: Mapping[str, str]
    models: tuple[str, ...]
    generated_tokens: float
    prompt_tokens: float
    running: float
    waiting: float

    @classmethod
    def parse(cls, text: str, now: float) -> Self | None:
        """Read the text of ``/metrics``; None if it has nothing of the plugin."""
        totals = _Totals()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                totals.add(sample.name, sample.labels, sample.value)
        own, workers = totals.own, totals.counted_at
        if not workers:
            return None
        all_links_known = totals.links == len(workers)
        return cls(
            time=now,
            counted_at=min(workers.values()),
            layers=totals.layers(),
            bytes_by_cause=totals.bytes_by_cause(),
            transfer_seconds=own("transfer_seconds_total"),
            prefetched=own("prefetched_total"),
            prefetch_hits=own("prefetch_hits_total"),
            predicted_hits=own("predicted_hits_total"),
            foreseeable=own("foreseeable_total"),
            slot_bytes=own("slot_bytes"),
            lent_bytes=own("lent_bytes"),
            boundary_block=own("boundary_block"),
            kv_blocks=own("kv_blocks"),
            workers=len(workers),
            link_bytes_per_s=own("pcie_bytes_per_second") if all_links_known else None,
            policies=totals.policies,
            models=tuple(sorted({model for model, _, _ in workers})),
            generated_tokens=totals.whole("vllm:generation_tokens_total"),
            prompt_tokens=totals.whole("vllm:prompt_tokens_total"),
            running=totals.whole("vllm:num_requests_running"),
            waiting=totals.whole("vllm:num_requests_waiting"),
        )


class _Totals:
    """The samples of all workers added up: each as a whole, by layer and by cause.

    ``counted_at`` and ``links`` tell of the workers when each counted, and how many know their
    link's rate.
    """

    def __init__(self) -> None:
        self.counted_at: dict[tuple[str, str, str], float] = {}
        self.links = 0
        self.policies: dict[str, str] = {}
        self._sums: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._causes: set[str] = set()
        self._layers: set[str] = set()

    def add(self, name: str, labels: Mapping[str, str], value: float) -> None:
        """Take a sample of anybody's."""
        self._sums[name, ""] += value
        if not name.startswith(PREFIX):
            return
        if layer := labels.get("layer"):
            self._sums[name, layer] += value
            self._layers |= {layer} if name == f"{PREFIX}slots" else set()
        if cause := labels.get("cause"):
            self._sums[name, f"cause {cause}"] += value
            self._causes |= {cause} if name == f"{PREFIX}bytes_total" else set()
        if name == f"{PREFIX}snapshot_timestamp_seconds":
            model, engine, worker = (labels.get(key, "") for key in _IDENTITY)
            self.counted_at[model, engine, worker] = value
        self.links += name == f"{PREFIX}pcie_bytes_per_second"
        if name == f"{PREFIX}policy_info":
            self.policies |= {k: v for k, v in labels.items() if k not in _IDENTITY}

    def whole(self, name: str) -> float:
        """All samples of a name."""
        return self._sums[name, ""]

    def own(self, name: str, part: str = "") -> float:
        """Those of the plugin's, or of a layer or a cause alone."""
        return self._sums[PREFIX + name, part]

    def layers(self) -> dict[str, LayerSample]:
        """Every layer that has slots, in their order."""
        names = ("hits_total", "misses_total", "resident_experts", "slots")
        return {
            layer: LayerSample(*(self.own(name, layer) for name in names))
            for layer in sorted(self._layers, key=_order)
        }

    def bytes_by_cause(self) -> dict[str, float]:
        """What was moved."""
        return {c: self.own("bytes_total", f"cause {c}") for c in sorted(self._causes)}


_IDENTITY = ("model_name", "engine", "worker")


def _order(layer: str) -> tuple[bool, int, str]:
    """Layers by number, those of a draft model behind."""
    number = layer.rpartition(".")[2]
    return "." in layer, int(number) if number.isdigit() else 0, layer


def read(url: str) -> Sample:
    """Ask a server.

    Args:
        url: of the server, as ``metrics_url`` returns it.

    Raises:
        OffloadError: nobody answers there, or somebody without the plugin.
    """
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode()
        sample = Sample.parse(text, time.monotonic())
    except urllib.error.HTTPError as error:
        raise OffloadError(
            "URL", url, f"the server answers {error.code} {error.reason}", "Give vLLM's address"
        ) from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise OffloadError(
            "URL", url, f"no server can be reached there ({reason})", "Start it, or correct the URL"
        ) from error
    except ValueError as error:
        raise OffloadError(
            "URL", url, "what it answers are no metrics", "Give vLLM's address"
        ) from error
    if sample is None:
        raise OffloadError(
            "URL",
            url,
            "the server has no metrics of the plugin",
            "Start it with --plugin moe-offload and a model that has experts",
        )
    return sample


def metrics_url(address: str) -> str:
    """Complete what a user calls a server's address: localhost:8000 will do.

    Raises:
        OffloadError: it is not an address of HTTP.
    """
    scheme, separator, rest = address.rpartition("://")
    if separator and scheme not in ("http", "https"):
        raise OffloadError("URL", address, f"{scheme} is not understood", "Give http://host:port")
    rest = rest.rstrip("/").removesuffix("/v1").removesuffix("/metrics")
    url = f"{scheme or 'http'}://{rest}/metrics"
    if not _names_a_server(url):
        raise OffloadError("URL", address, "it names no server", "Give http://host:port")
    return url


def _names_a_server(url: str) -> bool:
    with suppress(ValueError):
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    return False
