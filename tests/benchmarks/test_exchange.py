"""Engines in turn over one host pool."""

import gc
import weakref
from types import SimpleNamespace

import exchange
import torch
from exchange import Exchange, Successor

from vllm_moe_offload import engine
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.memory import HostMemory
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing

EXPERTS, LAYERS, TOP_K, TOKENS = 8, 3, 2, 5


def first_engine(**options):
    layout = ExpertLayout.pack(
        [("w13_weight", (8, 4), torch.float32), ("w2_weight", (4, 4), torch.float32)]
    )
    first = OffloadEngine(MoeOffloadConfig.parse(options), torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    routing = Routing(EXPERTS, TOP_K, tuple(range(EXPERTS)))
    for layer in range(LAYERS):
        spec = LayerSpec(f"{layer}", EXPERTS, layout, Activation("silu"), routing=routing)
        for tensor in first.add_layer(spec)[1].views().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    first.plan()
    first.finish_loading()
    return first


def outputs(of):
    generator = torch.Generator().manual_seed(2)
    found = []
    for layer in range(LAYERS):
        x_TH = torch.randn(TOKENS, 4, generator=generator)
        ids_TK = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP_K).indices.int()
        found.append(of.run(layer, x_TH, torch.full((TOKENS, TOP_K), 0.5), ids_TK))
    return torch.stack(found)


def test_a_successor_computes_the_same_with_other_options(monkeypatch):
    old = first_engine(cache_fraction=0.5)
    # The pool is there already: nothing of it has to fit in again.
    monkeypatch.setattr(engine, "available_host_memory", lambda: HostMemory(0, "the machine"))
    expected = outputs(old)
    assert bool(expected.any())
    new = Successor.of(old, {"cache_fraction": 0.25, "predictor": "markov", "policy": "lru"})
    arena = weakref.ref(old.arena)
    del old
    gc.collect()
    assert arena() is None, "the slots of the engine before are still there"
    new.plan()
    new.finish_loading()
    assert new.stats().slots == 2 * LAYERS
    assert new.policies == {"eviction": "lru", "predictor": "markov"}
    assert torch.equal(outputs(new), expected)
    new.check_integrity()


def test_graphs_are_captured_again_and_the_old_ones_kept(monkeypatch):
    old, graphs = object(), {}
    monkeypatch.setattr(exchange, "graphs_of", lambda worker: [graphs])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def capture():
        assert not graphs, "vLLM takes a shape that it has a graph of for done"
        graphs["shape"] = object()

    worker = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        model_runner=SimpleNamespace(capture_model=capture),
    )
    graphs["shape"] = old
    changed = Exchange(worker)
    changed._capture(worker)
    assert graphs["shape"] is not old
    assert changed._graphs == [{"shape": old}]
