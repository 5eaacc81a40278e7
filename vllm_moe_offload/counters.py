"""What the layers' counters and tables say, read without a step ever waiting.

A step adds to counters on the device. They are read on a stream of their own, beside the steps, by
a thread that waits for its own copy and for nothing else. A step that runs meanwhile may be caught
between two counters of a layer; such a reading is dropped and made again.

Legend: L layers, C counters, S slots of all layers.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.kernels.resolve import Counter
from vllm_moe_offload.offloaded_layer import OffloadedLayer

READINGS = 8
"""Readings beside a step before giving up: a torn one is a matter of microseconds."""


class Counters:
    """Reads the counters and tables of all layers of an engine.

    Args:
        layers: all layers of the model.
        device: where their tables are.
        row_seconds: what an expert of each layer takes to the device.
    """

    def __init__(
        self, layers: Sequence[OffloadedLayer], device: torch.device, row_seconds: Sequence[float]
    ) -> None:
        self._layers = layers
        self._row_seconds = row_seconds
        self._device = device
        self._lock = threading.Lock()
        sources = (
            [layer.residency.work.counters for layer in layers],
            [layer.residency.tables.expert_of_S for layer in layers],
        )
        self._copies = [_Copy(tensors, device) for tensors in sources]
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            # Only the thread that reads sleeps on it.
            self._done = torch.cuda.Event(blocking=True)

    def read(self) -> list[LayerCounts]:
        """Read what all steps that were queued so far have counted; waits for them."""
        with self._lock:
            return self._read(after_steps=True)

    def snapshot(self) -> list[LayerCounts] | None:
        """Read beside the steps; None if they got in between again and again."""
        with self._lock:
            for _ in range(READINGS):
                counts = self._read(after_steps=False)
                if all(layer.is_whole for layer in counts):
                    return counts
        return None

    def _read(self, *, after_steps: bool) -> list[LayerCounts]:
        if self._device.type == "cuda":
            steps = torch.cuda.current_stream(self._device)
            with torch.cuda.stream(self._stream):
                if after_steps:
                    self._stream.wait_stream(steps)
                for copy in self._copies:
                    copy.queue()
                self._done.record(self._stream)
            self._done.synchronize()
        else:
            for copy in self._copies:
                copy.queue()
        counters, tables = (copy.host for copy in self._copies)
        expert_of_S = tables.split([layer.residency.num_slots for layer in self._layers])
        values_LC = counters.view(len(self._layers), len(Counter)).tolist()
        return [
            _counts(layer, values, int((slots >= 0).sum()), seconds)
            for layer, values, slots, seconds in zip(
                self._layers, values_LC, expert_of_S, self._row_seconds, strict=True
            )
        ]


class _Copy:
    """Tensors of one type joined on their device and brought to pinned host memory."""

    def __init__(self, sources: Sequence[Tensor], device: torch.device) -> None:
        self._sources = list(sources)
        size, dtype = sum(source.numel() for source in sources), sources[0].dtype
        on_device = device.type != "cpu"
        self.host = torch.zeros(size, dtype=dtype, device="cpu", pin_memory=on_device)
        self._joined = torch.zeros(size, dtype=dtype, device=device) if on_device else self.host

    def queue(self) -> None:
        torch.cat(self._sources, out=self._joined)
        if self._joined is not self.host:
            self.host.copy_(self._joined, non_blocking=True)


def _counts(
    layer: OffloadedLayer, values: list[int], resident: int, row_seconds: float
) -> LayerCounts:
    return LayerCounts(
        layer=layer.spec.name,
        experts=layer.spec.num_experts,
        slots=layer.residency.num_open,
        row_bytes=layer.spec.layout.row_bytes,
        resident=resident,
        active=values[Counter.ACTIVE],
        hits=values[Counter.HITS],
        loads=values[Counter.LOADS],
        streams=values[Counter.STREAMS],
        surplus=values[Counter.SURPLUS],
        prefetched=values[Counter.PREFETCHED],
        prefetch_hits=values[Counter.PREFETCH_HITS],
        guessed=values[Counter.GUESSED],
        found=values[Counter.FOUND],
        foreseeable=values[Counter.FORESEEABLE],
        row_seconds=row_seconds,
        is_held=layer.is_held,
    )
