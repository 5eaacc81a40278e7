"""The next layer's router applied to this layer's input.

The residual stream changes little from one layer to the next, so the router of the next layer
often chooses nearly the same experts one layer early (Eliseev and Mazur 2023, arXiv 2312.17238,
section 3.2). Nothing is learned. The input is taken as it is: the two layers' norms have other
weights, which is left out.

Legend: T tokens, L layers, M tokens, K choices a token, E experts, H hidden size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_moe_offload.kernels.predict import GateLogits, powers
from vllm_moe_offload.predictors.predictor import Arrays

Router = Callable[[Tensor], Tensor]
"""From hidden states [T, H] to logits [T, E]."""


class GatePredictor:
    """Asks the next layer's router.

    Args:
        routers: the router of each layer.
        device: where the layers are computed.
    """

    def __init__(self, routers: Sequence[Router], device: torch.device) -> None:
        self._routers = list(routers)
        self._powers = powers(device)

    def source(self, layer: int, x_TH: Tensor) -> GateLogits:
        """The next router's logits for this layer's input."""
        return GateLogits(self._routers[layer + 1](x_TH), self._powers)

    def learn(self, ids_LTK: Tensor, num_tokens: int) -> None:
        """Nothing is learned."""

    def refresh(self) -> None:
        """Nothing is learned."""

    def forget(self) -> None:
        """Nothing is learned."""

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Nothing is kept."""
        return {}

    def from_arrays(self, arrays: Arrays) -> None:
        """Nothing is kept."""
