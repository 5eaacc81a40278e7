"""A whole engine over quantised experts: the same bits whatever is resident.

Legend: T tokens, K choices a token, E experts, H hidden size, I intermediate size.
"""

import pytest
import torch
from formats_of_tests import FORMATS, layout_of, random_rows

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.formats import ExpertFormat
from vllm_moe_offload.kernels.quantised_mlp import quantised_mlp_torch
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing

E, K, H, I = 6, 2, 256, 128  # noqa: E741
SILU = Activation("silu")
ROUTING = Routing(E, K, tuple(range(E)))
CHOSEN = ("fp8 block", "fp8 tensor", "int4 group 32, zeros", "mxfp4", "nvfp4")


def run(form: ExpertFormat, share: float, inputs, device) -> tuple[list[torch.Tensor], int]:
    torch.manual_seed(0)
    layout = layout_of(form, 2 * I, H, I, torch.bfloat16)
    engine = OffloadEngine(MoeOffloadConfig.parse({"cache_fraction": share}), device)
    spec = LayerSpec("layer", E, layout, SILU, routing=ROUTING, format=form)
    for _ in range(2):
        _, segment = engine.add_layer(spec)
        weights = random_rows(form, range(E), E, 2 * I, H, I, bias=torch.bfloat16)
        for name, view in segment.views().items():
            matrix = getattr(weights, name.partition("_")[0])
            kind = name.partition("_")[2]
            field = {"weight": "codes", "global": "global_scale", "input": "input_scale"}
            view.copy_(getattr(matrix, field.get(kind, kind)))
    engine.plan()
    engine.finish_loading()
    results = []
    for x_TH, weight_TK, ids_TK in inputs:
        y_TH = engine.run(0, x_TH, weight_TK, ids_TK)
        results.append(engine.run(1, y_TH, weight_TK, ids_TK))
    engine.check_integrity()
    misses = engine.stats().misses
    engine.close()
    return results, misses


def draw(tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    x_TH = torch.randn(tokens, H).to(device, torch.bfloat16)
    ids_TK = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)]).int()
    return x_TH, torch.rand(tokens, K).to(device), ids_TK.to(device)


@pytest.mark.parametrize("name", CHOSEN)
def test_the_same_bits_whatever_is_resident(name, device):
    torch.manual_seed(1)
    inputs = [draw(tokens, device) for tokens in (1, 4, 60, 2)]  # one of them is a sweep
    results, misses = zip(
        *(run(FORMATS[name], s, inputs, device) for s in (0, 0.5, 1)), strict=True
    )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert misses[0] > misses[1] > misses[2]


def test_the_engine_computes_what_the_torch_form_says(device):
    torch.manual_seed(1)
    form = FORMATS["mxfp4"]
    layout = layout_of(form, 2 * I, H, I, None)
    engine = OffloadEngine(MoeOffloadConfig.parse({"cache_fraction": 0.5}), device)
    _, segment = engine.add_layer(LayerSpec("layer", E, layout, SILU, format=form))
    weights = random_rows(form, range(E), E, 2 * I, H, I)
    for name, view in segment.views().items():
        matrix = getattr(weights, name.partition("_")[0])
        view.copy_(matrix.codes if name.endswith("weight") else matrix.scale)
    engine.plan()
    engine.finish_loading()
    x_TH, weight_TK, ids_TK = (t.cpu() for t in draw(9, device))
    expected = torch.empty(9, K, H)
    every = torch.arange(E, dtype=torch.int32)
    quantised_mlp_torch(x_TH.float(), weight_TK, ids_TK, every, weights, SILU, expected)
    actual = engine.run(0, x_TH.float().to(device), weight_TK.to(device), ids_TK.to(device))
    torch.testing.assert_close(actual.cpu(), expected.sum(1), rtol=1e-4, atol=1e-4)
    engine.close()
