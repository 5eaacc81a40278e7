"""How many bytes of experts have been moved so far, known late but without a step ever waiting.

Legend: L layers.
"""

import time
from collections.abc import Sequence

import torch

from vllm_moe_offload.kernels.resolve import Counter
from vllm_moe_offload.offloaded_layer import OffloadedLayer

PERIOD_S = 0.02
"""Seconds between two readings: no one decides more often on what they say."""

MOVED = (Counter.LOADS, Counter.STREAMS, Counter.SURPLUS, Counter.PREFETCHED)
"""What crossed the link because no slot held it."""


class Traffic:
    """Adds up what all layers have counted, by a small copy now and then in the stream of steps.

    Args:
        layers: all layers of the model.
        seconds_of_L: what an expert of each layer takes, as measured; 0 where nothing is moved.
        device: where they count.
    """

    def __init__(
        self, layers: Sequence[OffloadedLayer], seconds_of_L: Sequence[float], device: torch.device
    ) -> None:
        num_bytes, seconds = sum(x.spec.layout.row_bytes for x in layers), sum(seconds_of_L)
        self.bytes_per_second = num_bytes / seconds if seconds else 0.0
        """Measured rate of such moves, 0 if nothing is ever moved."""
        self._counters = [layer.residency.work.counters for layer in layers]
        on_device = device.type == "cuda"
        rows = [0 if layer.is_held else layer.spec.layout.row_bytes for layer in layers]
        self._row_bytes_L = torch.tensor(rows, dtype=torch.int64, device=device)
        self._moved = torch.tensor(MOVED, dtype=torch.int64, device=device)
        self._arrived = torch.cuda.Event() if on_device else None
        self._host = torch.zeros(1, dtype=torch.int64, pin_memory=on_device)
        self._asked_at = -PERIOD_S
        self._is_open = False
        self._known = 0

    def num_bytes(self) -> int:
        """Bytes moved since the start, as far as is known by now."""
        if self._is_open and (self._arrived is None or self._arrived.query()):
            self._known, self._is_open = int(self._host), False
        now = time.monotonic()
        if not self._is_open and now - self._asked_at >= PERIOD_S:
            self._asked_at, self._is_open = now, True
            self._ask()
        return self._known

    def _ask(self) -> None:
        moved_L = torch.stack(self._counters)[:, self._moved].sum(1)
        self._host.copy_((moved_L * self._row_bytes_L).sum(0, keepdim=True), non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
