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
        totals: defaultdict[tuple[str, str], float] = defaultdict(float)
        workers: dict[tuple[str, str, str], float] = {}
        policies: dict[str, str] = {}
        links = 0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name, labels = sample.name, sample.labels
                totals[name, ""] += sample.value
                if not name.startswith(PREFIX):
                    continue
                if "layer" in labels:
                    totals[name, labels["layer"]] += sample.value
                if "cause" in labels:
                    totals[name, f"cause {labels['cause']}"] += sample.value
                worker = tuple(labels.get(key, "") for key in ("model_name", "engine", "worker"))
                if name == f"{PREFIX}snapshot_timestamp_seconds":
                    workers[worker[0], worker[1], worker[2]] = sample.value
                links += name == f"{PREFIX}pcie_bytes_per_second"
                if name == f"{PREFIX}policy_info":
                    policies |= {k: v for k, v in labels.items() if k not in _IDENTITY}
        if not workers:
            return None

        def total(name: str, part: str = "") -> float:
            return totals[name, part]

        def own(name: str, part: str = "") -> float:
            return totals[PREFIX + name, part]

        names = {part for name, part in totals if name == f"{PREFIX}slots" and part}
        causes = [
            part
            for name, part in totals
            if name == f"{PREFIX}bytes_total" and part.startswith("cause ")
        ]
        return cls(
            time=now,
            counted_at=min(workers.values()),
            layers={
                layer: LayerSample(
                    own("hits_total", layer),
                    own("misses_total", layer),
                    own("resident_experts", layer),
                    own("slots", layer),
                )
                for layer in sorted(names, key=_order)
            },
            bytes_by_cause={c.removeprefix("cause "): own("bytes_total", c) for c in causes},
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
            link_bytes_per_s=own("pcie_bytes_per_second") if links == len(workers) else None,
            policies=policies,
            models=tuple(sorted({model for model, _, _ in workers})),
            generated_tokens=total("vllm:generation_tokens_total"),
            prompt_tokens=total("vllm:prompt_tokens_total"),
            running=total("vllm:num_requests_running"),
            waiting=total("vllm:num_requests_waiting"),
        )


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
