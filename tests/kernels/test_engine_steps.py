"""Whole decode steps of an engine on the kernels: all layers, one after the other, many times.

On a GPU the steps are replays of one CUDA graph; in the interpreter there are fewer and smaller
ones, which run as they are.

Legend: T tokens, K choices a token, L layers, E experts, H hidden size, I intermediate size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.operations import TRITON
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="only a GPU has graphs and can be waited for")

POISON = 0xFF
"""Bytes of this value are NaN in every floating-point type."""


@dataclass(frozen=True)
class Size:
    """Of a model, and of a test of it."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    tokens: int
    choices: int
    slots: tuple[int, ...]
    dtype: torch.dtype
    routings: int
    steps: int
    check_every: int


REQUIRED = Size(3, 32, 256, 128, 4, 4, (0, 8, 32), torch.bfloat16, 1000, 10_000, 100)
INTERPRETED = Size(2, 6, 32, 16, 2, 2, (0, 2, 6), torch.float32, 4, 10, 5)
SIZE = REQUIRED if HAS_GPU else INTERPRETED
FEW_SLOTS = SIZE.slots[1]


@contextmanager
def engine_with(num_slots: int, device: torch.device) -> Iterator[OffloadEngine]:
    """An engine of random weights, NaN wherever nothing has been loaded."""
    columns = 2 * SIZE.intermediate
    layout = ExpertLayout.pack(
        [
            ("w13_weight", (columns, SIZE.hidden), SIZE.dtype),
            ("w2_weight", (SIZE.hidden, SIZE.intermediate), SIZE.dtype),
        ]
    )
    # Staging of two rows a block, so that a step has several waves.
    options = {
        "cache_fraction": num_slots / SIZE.experts,
        "staging_mb": 4 * layout.row_bytes / 2**20,
    }
    engine = OffloadEngine(MoeOffloadConfig.parse(options), device)
    generator = torch.Generator().manual_seed(0)
    for number in range(SIZE.layers):
        spec = LayerSpec(f"layer {number}", SIZE.experts, layout, Activation("silu"))
        _, segment = engine.add_layer(spec)
        for view in segment.views().values():
            weights = torch.randn(view.shape, generator=generator) / view.shape[-1] ** 0.5
            view.copy_(2 * weights)
    engine.plan()
    engine.finish_loading()
    engine.arena.buffer.fill_(POISON)
    for block in engine.staging.blocks:
        block.fill_(POISON)
    assert engine._layers[0].operations is TRITON
    try:
        yield engine
    finally:
        engine.close()


@dataclass
class Inputs:
    x_TH: torch.Tensor
    weight_TK: torch.Tensor
    ids_LTK: torch.Tensor

    @classmethod
    def draw(cls, generator: torch.Generator) -> "Inputs":
        """Draw on the generator's device, one in eight choices inactive."""
        device, shape = generator.device, (SIZE.layers, SIZE.tokens, SIZE.choices)
        x_TH = torch.randn(SIZE.tokens, SIZE.hidden, generator=generator, device=device)
        weight_TK = torch.rand(shape[1:], generator=generator, device=device)
        scores = torch.rand(*shape[:2], SIZE.experts, generator=generator, device=device)
        ids_LTK = scores.topk(SIZE.choices).indices.int()
        ids_LTK[torch.rand(shape, generator=generator, device=device) < 1 / 8] = -1
        return cls(x_TH.to(SIZE.dtype), weight_TK, ids_LTK)

    def copy_(self, other: "Inputs") -> None:
        for name, tensor in vars(self).items():
            tensor.copy_(getattr(other, name))


def decode(engine: OffloadEngine, inputs: Inputs) -> torch.Tensor:
    """One step: every layer on what the one before it gave, [T, H]."""
    x_TH = inputs.x_TH
    for layer in range(SIZE.layers):
        x_TH = x_TH + engine.run(layer, x_TH, inputs.weight_TK, inputs.ids_LTK[layer])
    return x_TH


def repeatable(engine: OffloadEngine, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """A step on what the inputs hold at the time: the replay of a graph, where there are any."""
    decode(engine, inputs)
    if not HAS_GPU:
        return lambda: decode(engine, inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TH = decode(engine, inputs)

    def replay() -> torch.Tensor:
        graph.replay()
        return y_TH

    return replay


@pytest.mark.parametrize("num_slots", SIZE.slots)
def test_other_routings_give_the_bits_of_all_resident_experts(num_slots, device):
    generator = torch.Generator(device).manual_seed(1)
    inputs = Inputs.draw(generator)
    with engine_with(num_slots, device) as engine, engine_with(SIZE.experts, device) as resident:
        step = repeatable(engine, inputs)
        for routing in range(SIZE.routings):
            inputs.copy_(Inputs.draw(generator))
            y_TH = step()
            expected_TH = decode(resident, inputs)
            assert torch.equal(y_TH, expected_TH), f"routing {routing}"
        engine.check_integrity()
        assert (engine.stats().streamed > 0) == (num_slots < SIZE.experts)


def test_many_steps_keep_every_slot_whole(device):
    generator = torch.Generator(device).manual_seed(2)
    inputs = Inputs.draw(generator)
    with engine_with(FEW_SLOTS, device) as engine:
        step = repeatable(engine, inputs)
        engine.reset_stats()
        active = torch.zeros((), dtype=torch.int64, device=device)
        before = int(engine.residency(0).tables.clock)
        for number in range(1, SIZE.steps + 1):
            inputs.copy_(Inputs.draw(generator))
            y_TH = step()
            active += distinct(inputs.ids_LTK)
            if number % SIZE.check_every == 0:
                engine.check_integrity()
                assert not y_TH.isnan().any(), f"step {number} read what was never loaded"
        stats = engine.stats()
        assert stats.active == int(active)
        assert stats.hits > 0
        assert stats.bytes_moved == stats.misses * engine.specs[0].layout.row_bytes
        assert int(engine.residency(0).tables.clock) - before == SIZE.steps


def distinct(ids_LTK: torch.Tensor) -> torch.Tensor:
    """How many experts a step reads, over all layers."""
    flat = (ids_LTK.flatten(1) + 1).long()
    named = torch.zeros(SIZE.layers, SIZE.experts + 1, dtype=torch.int64, device=flat.device)
    return named.scatter_(1, flat, 1)[:, 1:].sum()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("num_slots", SIZE.slots)
def test_a_whole_step_never_waits_for_the_device(num_slots, device):
    inputs = Inputs.draw(torch.Generator(device).manual_seed(3))
    with engine_with(num_slots, device) as engine:
        decode(engine, inputs)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decode(engine, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("num_slots", SIZE.slots)
def test_a_sweep_waits_for_the_device_at_its_first_layer_only(num_slots, device):
    tokens, experts = 1024, SIZE.experts
    x_TH = torch.randn(tokens, SIZE.hidden, dtype=SIZE.dtype, device=device)
    weight_TK = torch.rand(tokens, SIZE.choices, device=device)
    ids_TK = torch.randint(-1, experts, weight_TK.shape, dtype=torch.int32, device=device)
    with engine_with(num_slots, device) as engine:
        assert engine._layers[0].is_sweep(ids_TK.numel())
        for _ in range(2):  # the first one fills slots and compiles
            for layer in range(SIZE.layers):
                engine.run(layer, x_TH, weight_TK, ids_TK)
        engine.run(0, x_TH, weight_TK, ids_TK)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for layer in range(1, SIZE.layers):
                engine.run(layer, x_TH, weight_TK, ids_TK)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.check_integrity()


@pytest.mark.gpu
@needs_gpu
def test_the_sync_debug_mode_notices_a_wait(device):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=device).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
