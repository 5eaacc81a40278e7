"""An engine after very many steps: counters, clocks and memory."""

import gc
import sys

import pytest
import torch

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.resolve import Counter
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing

EXPERTS, TOP_K, LAYERS = 8, 2, 3
MANY = 86_400 * 365 * 200
"""Steps of a year at two hundred a second."""

POLICIES = [{"policy": "lru"}, {"policy": "adaptive"}, {"predictor": "markov"}]


def make_engine(options) -> OffloadEngine:
    engine = OffloadEngine(
        MoeOffloadConfig.parse({"cache_fraction": 0.5, **options}), torch.device("cpu")
    )
    layout = ExpertLayout.pack(
        [("w13_weight", (16, 16), torch.float32), ("w2_weight", (16, 8), torch.float32)]
    )
    routing = Routing(EXPERTS, TOP_K, tuple(range(EXPERTS)))
    generator = torch.Generator().manual_seed(0)
    for number in range(LAYERS):
        spec = LayerSpec(f"layer {number}", EXPERTS, layout, Activation("silu"), routing=routing)
        for view in engine.add_layer(spec)[1].views().values():
            view.copy_(torch.randn(view.shape, generator=generator))
    engine.plan()
    engine.finish_loading()
    return engine


def run(engine: OffloadEngine, steps: range) -> torch.Tensor:
    """Run steps, each a function of its number; the output of the last."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        y_TH = torch.randn(1 + step % 3, 16, generator=generator)
        tokens = y_TH.shape[0]
        engine.step_begins(0, tokens)
        for layer in range(LAYERS):
            ids_TK = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
            weight_TK = torch.rand(tokens, TOP_K, generator=generator)
            y_TH = engine.run(layer, y_TH, weight_TK, ids_TK)
        engine.step_ended(0)
    return y_TH


@pytest.mark.parametrize("options", POLICIES)
def test_nothing_overflows(options):
    fresh, aged = make_engine(options), make_engine(options)
    run(fresh, range(20))
    run(aged, range(20))
    shift = MANY * TOP_K
    counted = torch.full((len(Counter),), shift)
    counted[Counter.ACTIVE] = 3 * shift  # hits, loads and streams
    for layer in range(LAYERS):
        residency = aged.residency(layer)
        residency.tables.clock.add_(shift)
        used = residency.tables.stamp_S >= 0
        residency.tables.stamp_S[used] += shift
        residency.work.counters.add_(counted)
    assert torch.equal(run(aged, range(20, 60)), run(fresh, range(20, 60)))
    for layer in range(LAYERS):
        old, new = aged.residency(layer), fresh.residency(layer)
        assert torch.equal(old.tables.slot_of_E, new.tables.slot_of_E)
        assert torch.equal(old.work.counters, new.work.counters + counted)
        assert int(old.work.counters[Counter.ACTIVE]) > 2**32
    aged.check_integrity()
    assert aged.stats().demand_bytes > 2**40


def held() -> tuple[int, int]:
    """Number and bytes of what the garbage collector knows: containers, instances, tensors.

    Not of every allocation: torch and the interpreter fill caches of names for thousands of steps.
    """
    gc.collect()
    objects = gc.get_objects()
    return len(objects), sum(map(sys.getsizeof, objects))


@pytest.mark.parametrize("options", POLICIES)
def test_steps_leave_no_memory_behind(options):
    engine = make_engine(options)
    run(engine, range(600))  # What is bounded has filled.
    engine.stats()
    count, size = held()
    run(engine, range(600, 1100))
    engine.stats()
    later_count, later_size = held()
    # Less than an object in five steps and a pointer a step; what earlier tests left may go.
    assert later_count - count < 500 // 5
    assert later_size - size < 8 * 500


@pytest.mark.parametrize("leaked", [torch.zeros, float], ids=["tensors", "numbers"])
def test_a_leak_would_be_seen(leaked):
    count, size = held()
    kept = [leaked(1) for _ in range(500)]
    later_count, later_size = held()
    assert later_count > count + 500 or later_size - size >= 8 * len(kept)
