"""Copies beside a step while CUDA graphs are captured, with streams that keep order only.

The fakes know the rules of a capture: a stream that waits for captured work is captured too, a
captured stream may wait for nothing that is not of its capture, and when a capture ends the stream
that began it must have waited for all others.

Legend: L layers.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from vllm_moe_offload import assembly
from vllm_moe_offload.beside import beside_on
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing
from vllm_moe_offload.step import FEW_PAIRS

L, E, K, H = 4, 16, 2, 16
ROW = ExpertLayout.pack(
    [("w13_weight", (2 * H, H), torch.float32), ("w2_weight", (H, H), torch.float32)]
)


@dataclass(frozen=True, eq=False)
class Event:
    capture: object
    stream: "Stream"
    work: int


class Stream:
    """A stream in or outside a capture."""

    def __init__(self) -> None:
        self.capture: object = None
        self.work = 0
        self.waited: dict[Stream, int] = {}

    def record_event(self) -> Event:
        return Event(self.capture, self, self.work)

    def wait_event(self, event: Event) -> None:
        assert self.capture in (None, event.capture), "waits for what is not in the capture"
        if event.capture is not None and self.capture is None:
            self.capture = event.capture
            self.work, self.waited = 0, {}
        self.waited[event.stream] = max(event.work, self.waited.get(event.stream, 0))

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Streams:
    """The current stream, and another that has been made."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.main, self.side = Stream(), Stream()
        self._current = self.main
        patch.setattr(torch.cuda, "Stream", lambda *_args, **_options: self.side)
        patch.setattr(torch.cuda, "current_stream", lambda _device=None: self._current)
        patch.setattr(torch.cuda, "stream", self._using)

    @contextmanager
    def _using(self, stream: Stream):
        self._current = stream
        yield
        stream.work += 1
        self._current = self.main

    @contextmanager
    def capture(self):
        self.main.capture = object()
        self.main.waited = {}
        yield
        if self.side.capture is self.main.capture:
            assert self.main.waited.get(self.side) == self.side.work, "ends before it is joined"
        self.main.capture = self.side.capture = None
        self.main.waited, self.side.waited = {}, {}


@pytest.fixture
def streams(monkeypatch):
    return Streams(monkeypatch)


def make(monkeypatch, **options) -> OffloadEngine:
    beside = beside_on(torch.device("cuda"))
    monkeypatch.setattr(assembly, "beside_on", lambda _device: beside)
    engine = OffloadEngine(MoeOffloadConfig.parse(options), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for number in range(L):
        routing = Routing(E, K, tuple(range(E)))
        spec = LayerSpec(f"layer {number}", E, ROW, Activation("silu"), routing=routing)
        for view in engine.add_layer(spec)[1].views().values():
            view.copy_(torch.randn(view.shape, generator=generator))
    engine.routers = [lambda x_TH: x_TH[:, :E]] * L
    engine.plan()
    engine.finish_loading()
    return engine


def run_layer(engine: OffloadEngine, layer: int, tokens: int = 3) -> None:
    generator = torch.Generator().manual_seed(layer)
    engine.run(
        layer,
        torch.randn(tokens, H, generator=generator),
        torch.rand(tokens, K, generator=generator),
        torch.randint(-1, E, (tokens, K), generator=generator),
    )


def run_step(engine: OffloadEngine, tokens: int = 3) -> None:
    for layer in range(L):
        run_layer(engine, layer, tokens)


PREDICTORS = ["none", "gate", "markov", "eam"]


@pytest.mark.parametrize("tokens", [1, 12, 40])
@pytest.mark.parametrize("slots", [0.0, 0.125, 0.5, 1.0])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_graphs_of_layers_and_of_steps_follow_each_other(
    predictor, slots, tokens, streams, monkeypatch
):
    rows = {} if predictor == "none" else {"prefetch_mb": 3 * ROW.row_bytes / 2**20}
    engine = make(monkeypatch, cache_fraction=slots, predictor=predictor, **rows)
    for _ in range(2):
        run_step(engine, tokens)
        with streams.capture():
            run_step(engine, tokens)
        run_step(engine, tokens)
        if engine._prefetch is not None:
            monkeypatch.setattr(engine._prefetch, "_spans_layers", lambda: False)
        for layer in range(L):
            with streams.capture():
                run_layer(engine, layer, tokens)
        if engine._prefetch is not None:
            monkeypatch.setattr(engine._prefetch, "_spans_layers", lambda: True)
    if 0 < slots < 1 and (predictor != "none" or tokens * K > FEW_PAIRS):
        assert streams.side.work > 0


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_graphs_of_several_sizes_are_captured_as_vllm_does(predictor, streams, monkeypatch):
    """Pieces of every size, the largest first, each after a step without; then whole steps."""
    engine = make(monkeypatch, cache_fraction=0.25, predictor=predictor)
    sizes = (40, 12, 3, 1)
    for is_whole in (False, True, False, True):
        if engine._prefetch is not None:
            monkeypatch.setattr(engine._prefetch, "_spans_layers", lambda: True)
        for tokens in sizes:
            run_step(engine, tokens)
            if engine._prefetch is not None:
                monkeypatch.setattr(engine._prefetch, "_spans_layers", lambda w=is_whole: w)
            if is_whole:
                with streams.capture():
                    run_step(engine, tokens)
                continue
            for layer in range(L):
                with streams.capture():
                    run_layer(engine, layer, tokens)
    assert streams.side.work > 0


def test_prefetch_stays_open_until_the_next_layer(streams, monkeypatch):
    engine = make(monkeypatch, cache_fraction=0.5, predictor="markov", prefetch_mb=1)
    with pytest.raises(AssertionError, match="before it is joined"), streams.capture():
        run_layer(engine, 0)


def test_a_capture_does_not_wait_for_copies_before_it(streams, monkeypatch):
    engine = make(monkeypatch, cache_fraction=0.5, predictor="markov", prefetch_mb=1)
    run_layer(engine, 0)
    with pytest.raises(AssertionError, match="not in the capture"), streams.capture():
        run_layer(engine, 1)
