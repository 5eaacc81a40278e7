"""Where a model keeps the routers of its MoE layers.

Reads: the modules of a built model; ``gate`` or ``router`` beside a layer's experts.
Versions: 0.32, 0.33.
Why: the predictor ``gate`` asks the next layer's router, which belongs to the model's own block.
How: look for a linear layer of that name in the module that holds the experts, and call it as the
    model does; its weight is loaded later, and on some devices packed away.
Can go: when every MoE runner holds its own gate.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from vllm_moe_offload.offloaded_layer import LayerSpec
from vllm_moe_offload.predictors.gate import Router

NAMES = ("gate", "router")


def find_routers(model: Any, specs: Sequence[LayerSpec]) -> list[Router] | None:
    """Return the router of every layer; None if that of one of them is not found.

    Args:
        model: the built model.
        specs: its offloaded layers.
    """
    modules = dict(model.named_modules())
    found = [_find(modules.get(spec.name.rpartition(".experts")[0]), spec) for spec in specs]
    routers = [router for router in found if router is not None]
    return routers if len(routers) == len(specs) else None


def _find(block: Any, spec: LayerSpec) -> Router | None:
    # The second matrix has a row for every hidden value, while a row of the first may be packed.
    hidden, _ = next(t.shape for t in spec.layout.tensors if t.name == "w2_weight")
    for name in NAMES:
        module = getattr(block, name, None)
        weight = getattr(module, "weight", None)
        # A worker that holds some of the experts would need a part of the router, and experts that
        # see a transformed input a part of the model.
        if weight is not None and tuple(weight.shape) == (spec.num_experts, hidden):
            return partial(_logits, module)
    return None


def _logits(module: Any, x_TH: Tensor) -> Tensor:
    result = module(x_TH)
    return result[0] if isinstance(result, tuple) else result
