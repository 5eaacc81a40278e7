"""Prefetch beside the computation on a GPU: within one CUDA graph, and without waiting.

Legend: L layers, T tokens, K choices a token, E experts, H hidden size.
"""

import pytest
import torch

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing

L, T, K, E, H, COLUMNS = 4, 3, 2, 16, 64, 32
ROW = ExpertLayout.pack([("w13_weight", (2 * COLUMNS, H), torch.bfloat16),
                         ("w2_weight", (H, COLUMNS), torch.bfloat16)])  # fmt: skip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and graphs need a GPU"),
]


def make(device, **options) -> OffloadEngine:
    engine = OffloadEngine(MoeOffloadConfig.parse(options), device)
    generator = torch.Generator().manual_seed(0)
    for number in range(L):
        routing = Routing(E, K, tuple(range(E)))
        spec = LayerSpec(f"layer {number}", E, ROW, Activation("silu"), routing=routing)
        _, segment = engine.add_layer(spec)
        for view in segment.views().values():
            view.copy_(torch.randn(view.shape, generator=generator) * 0.1)
    weights = torch.randn(L, E, H, generator=generator).bfloat16().to(device)
    engine.routers = [lambda x_TH, w=weight: x_TH @ w.T for weight in weights]
    engine.plan()
    engine.finish_loading()
    return engine


def draw(seed, device):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(T, H, generator=generator).bfloat16().to(device),
        torch.rand(T, K, generator=generator).to(device),
        torch.randint(-1, E, (L, T, K), generator=generator).int().to(device),
    )


def forward(engine, x_TH, weight_TK, ids_LTK) -> torch.Tensor:
    for layer, ids_TK in enumerate(ids_LTK):
        x_TH = engine.run(layer, x_TH, weight_TK, ids_TK)
    return x_TH


@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("predictor", ["gate", "markov", "eam"])
def test_a_graph_gives_the_same_bits(predictor, is_whole, device):
    options = {"predictor": predictor, "prefetch_mb": 3 * ROW.row_bytes / (1 << 20)}
    engine, plain = make(device, cache_fraction=0.5, **options), make(device, cache_fraction=1)
    engine._prefetch._spans_layers = lambda: is_whole
    inputs = draw(0, device)
    forward(engine, *inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward(engine, *inputs)
    for seed in range(1, 200):
        others = draw(seed, device)
        for tensor, other in zip(inputs, others, strict=True):
            tensor.copy_(other)
        engine.step_begins(0, T)
        graph.replay()
        engine.step_ended(0)
        assert torch.equal(result, forward(plain, *others))
    engine.check_integrity()
    stats = engine.stats()
    assert stats.prefetched > 0 or predictor == "eam"


@pytest.mark.parametrize("predictor", ["gate", "markov", "eam"])
def test_a_step_never_waits_for_the_device(predictor, device):
    engine = make(device, cache_fraction=0.5, predictor=predictor)
    inputs = draw(0, device)
    forward(engine, *inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(70):
            engine.step_begins(0, T)
            forward(engine, *inputs)
            engine.step_ended(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
