"""Finding the routers in modules built as models build them."""

import pytest
import torch
from formats_of_tests import FORMATS, layout_of
from torch import nn

from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec
from vllm_moe_offload.patches.routers import find_routers

EXPERTS, HIDDEN = 6, 8


class Linear(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Block(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def model_of(*blocks: Block) -> nn.Module:
    return Block(layers=nn.ModuleList(Block(mlp=block) for block in blocks))


def specs(count: int) -> list[LayerSpec]:
    layout = ExpertLayout.pack([("w13_weight", (4, HIDDEN), torch.float32),
                                ("w2_weight", (HIDDEN, 2), torch.float32)])  # fmt: skip
    return [LayerSpec(f"layers.{n}.mlp.experts", EXPERTS, layout, Activation("silu"))
            for n in range(count)]  # fmt: skip


def router(experts: int = EXPERTS, hidden: int = HIDDEN, kind: type = Linear) -> nn.Module:
    return kind(hidden, experts, bias=True)


@pytest.mark.parametrize("name", ["gate", "router"])
@pytest.mark.parametrize("kind", [Linear, nn.Linear])
def test_they_are_called_as_the_model_does(name, kind):
    modules = [router(kind=kind) for _ in range(2)]
    found = find_routers(model_of(*(Block(**{name: module}) for module in modules)), specs(2))
    x_TH = torch.randn(3, HIDDEN)
    for module, one in zip(modules, found, strict=True):
        assert torch.equal(one(x_TH), nn.functional.linear(x_TH, module.weight, module.bias))


@pytest.mark.parametrize("form", FORMATS)
def test_experts_may_be_quantised(form):
    """A router sees all of a token, in however few bytes the experts' weights are stored."""
    hidden, intermediate = 256, 128
    layout = layout_of(FORMATS[form], 2 * intermediate, hidden, intermediate, torch.float32)
    layers = [
        LayerSpec(f"layers.{n}.mlp.experts", EXPERTS, layout, Activation("silu"),
                  format=FORMATS[form])
        for n in range(2)
    ]  # fmt: skip
    modules = [router(hidden=hidden) for _ in layers]
    found = find_routers(model_of(*(Block(gate=module) for module in modules)), layers)
    x_TH = torch.randn(3, hidden)
    for module, one in zip(modules, found, strict=True):
        assert torch.equal(one(x_TH), module(x_TH)[0])
    # As wide as the bytes of a row of 4-bit codes.
    narrow = [Block(gate=router(hidden=hidden // 2)) for _ in layers]
    assert find_routers(model_of(*narrow), layers) is None


@pytest.mark.parametrize(
    "block",
    [Block(), Block(other=router()), Block(gate=router(EXPERTS + 1)), Block(gate=router(hidden=4))],
)
def test_all_or_none(block):
    assert find_routers(model_of(Block(gate=router()), block), specs(2)) is None


def test_no_such_block():
    assert find_routers(model_of(Block(gate=router())), specs(2)) is None
