"""Reports a worker's counts from a thread beside its steps."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path

from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.engine_stats import EngineStats
from vllm_moe_offload.lifeline import Claim
from vllm_moe_offload.metrics.page import Page, Worker, claim_page, layer_label
from vllm_moe_offload.sizes import GIB

PERIOD_S = 1.0
"""Seconds between two readings at most; Prometheus asks every 15 s or so."""

Counts = list[list[LayerCounts]]
"""By engine, and by layer of an engine."""


class Reporter:
    """Writes a worker's page and, every ``stats_interval_s``, a line of log.

    While a worker does nothing it reads nothing, and it never reads while the worker sleeps: the
    tables may be unmapped then.

    Args:
        engines: those of the worker, the served model's first.
        worker: whose page it is.
        path: where the page is written, None for nowhere.
        log: takes the lines.
        link_rate: tells the bytes a second of the GPU's PCIe link, None if it cannot.
    """

    def __init__(
        self,
        engines: Sequence[OffloadEngine],
        worker: Worker,
        path: Path | None,
        log: Callable[[str], None],
        link_rate: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._engines = list(engines)
        self._worker = worker
        self._path = path
        self._log = log
        self._link_rate = link_rate
        self._interval_s = engines[0].config.stats_interval_s
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moe-offload-stats", daemon=True)
        self._logged_at = time.monotonic()
        self._steps = self._read_steps = self._logged_steps = 0
        self._counts: Counts = []
        self._settled = True
        self._claim: Claim | None = None

    def start(self) -> None:
        """Write a first page and report from now on."""
        if self._path is not None:
            # As for the page itself: a full disk must not keep the worker from serving.
            with suppress(OSError):
                self._claim = claim_page(self._path)
        self._counts = self._exact()
        self._publish()
        self._thread.start()

    def note_step(self) -> None:
        """Tell that a step has been queued."""
        self._steps += 1

    def pause(self) -> None:
        """Read nothing from now on until the next step."""
        with self._lock:
            self._read_steps, self._settled = self._steps, True

    def close(self) -> None:
        """Stop; read a last time, waiting for the device, and log what it says."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._interval_s and self._steps:
            # A server that ends because its device failed has nothing more to tell.
            with suppress(RuntimeError):
                self._counts = self._exact()
            self._log(line(self._total()))
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        if self._claim is not None:
            self._claim.release()

    def tick(self, now: float) -> None:
        """Report if there may be something new.

        Steps are queued ahead of the device, so that the first reading after the last step may
        come too early: reading goes on until nothing changes any more.
        """
        with self._lock:
            steps = self._steps
            if steps != self._read_steps or not self._settled:
                self._read(steps)
            if self._interval_s and now - self._logged_at >= self._interval_s:
                if steps != self._logged_steps:
                    self._log(line(self._total()))
                self._logged_at, self._logged_steps = now, steps

    def _run(self) -> None:
        period = min(PERIOD_S, self._interval_s or PERIOD_S)
        while not self._stop.wait(period):
            try:
                self.tick(time.monotonic())
            except Exception as error:
                # Whatever it is, requests must not suffer from it.
                self._log(f"moe-offload: the statistics end here: {error!r}")
                return

    def _exact(self) -> Counts:
        return [engine.layer_counts() for engine in self._engines]

    def _read(self, steps: int) -> None:
        counts = [layers for engine in self._engines if (layers := engine.snapshot()) is not None]
        if len(counts) < len(self._engines):
            return  # steps got in between; the next tick tries again
        self._settled = counts == self._counts and steps == self._read_steps
        self._read_steps = steps
        if counts != self._counts:
            self._counts = counts
            self._publish()

    def _publish(self) -> None:
        if self._path is None:
            return
        total = self._total()
        # The model that drafts for the served one borrows nothing.
        boundary, blocks = self._engines[0].shared_blocks or (None, None)
        page = Page(
            worker=self._worker,
            time=time.time(),
            layers=labelled(self._counts),
            pool_bytes=total.pool_bytes,
            slot_bytes=total.slot_bytes,
            staging_bytes=total.staging_bytes,
            policies=self._engines[0].policies,
            pcie_bytes_per_s=self._link_rate(),
            lent_bytes=total.lent_bytes,
            boundary_block=boundary,
            kv_blocks=blocks,
        )
        # A full disk must not end the statistics for good.
        with suppress(OSError):
            page.write(self._path)

    def _total(self) -> EngineStats:
        pairs = zip(self._engines, self._counts, strict=True)
        return reduce(add, (engine.total(layers) for engine, layers in pairs))


def labelled(counts: Counts) -> list[LayerCounts]:
    """All layers under their labels; those of a draft model have it in front."""
    return [
        replace(layer, layer=f"{'draft.' * engine}{layer_label(layer.layer)}")
        for engine, layers in enumerate(counts)
        for layer in layers
    ]


def line(stats: EngineStats) -> str:
    """One line for the log."""
    gib = [n / GIB for n in (stats.demand_bytes, stats.wave_bytes, stats.prefetch_bytes)]
    return (
        f"moe-offload: {stats.hit_ratio:.1%} of {stats.active} active experts were in slots, "
        f"{stats.misses} missed; moved {stats.bytes_moved / GIB:.2f} GiB ({gib[0]:.2f} on demand, "
        f"{gib[1]:.2f} in waves, {gib[2]:.2f} ahead) in {stats.transfer_seconds:.1f} s, "
        f"stalls of {stats.stall_seconds:.1f} s at most, "
        f"{stats.resident} of {stats.slots} slots in use{_foresight(stats)}"
    )


def _foresight(stats: EngineStats) -> str:
    """What prediction and prefetch were good for, if there were any."""
    shares = {
        "of active experts were foreseen": stats.coverage,
        "of those moved ahead were read": stats.precision,
    }
    return "".join(f", {share:.1%} {text}" for text, share in shares.items() if share is not None)
