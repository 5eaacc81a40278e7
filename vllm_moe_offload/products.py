"""Products: what the experts of one layer make of one step's tokens.

Legend: T tokens, K choices a token, E local experts, H hidden size.
"""

import torch
from torch import Tensor

from vllm_moe_offload.kernels.dispatch import Dispatch
from vllm_moe_offload.kernels.expert_mlp import ExpertWeights, TileConfig
from vllm_moe_offload.kernels.quantised_mlp import QuantisedWeights
from vllm_moe_offload.offloaded_layer import OffloadedLayer


def tiles_of(layer: OffloadedLayer, tokens: int, pairs: int, dtype: torch.dtype) -> TileConfig:
    """Tiles of a step of so many tokens and routed pairs, active or not."""
    if layer.spec.tiles:
        return layer.spec.tiles(tokens)
    return layer.slots.weights.tiles(layer.spec.num_experts, pairs, dtype)


class Products:
    """The experts' results for one layer's tokens, and their sum.

    Every (token, choice) pair writes a row of its own, and one reduction in choice order ends
    the step, so that the result does not depend on when and from where a pair was computed.
    """

    def __init__(
        self, layer: OffloadedLayer, x_TH: Tensor, weight_TK: Tensor, ids_TK: Tensor
    ) -> None:
        self._layer = layer
        self._inputs = (x_TH, weight_TK, ids_TK)
        self._rows_TKH = x_TH.new_empty((*ids_TK.shape, layer.slots.weights.hidden))
        self._tiles: TileConfig | None = None
        self.lists: Dispatch | None = None
        if layer.operations.sorts_pairs:
            pairs, experts = ids_TK.numel(), layer.spec.num_experts
            self._tiles = tiles_of(layer, x_TH.shape[0], pairs, x_TH.dtype)
            self.lists = Dispatch.empty(pairs, experts, self._tiles.block_m, x_TH.device)
        self._product, self._prepared = layer.operations.products(
            layer.spec.format, x_TH, self._tiles
        )

    def compute(self, row_of_E: Tensor, weights: ExpertWeights | QuantisedWeights) -> None:
        """Compute the pairs whose expert has a row in ``weights``, see ``kernels.expert_mlp``."""
        spec, do = self._layer.spec, self._layer.operations
        self._product(
            *self._inputs, row_of_E, weights, spec.activation, self._rows_TKH,
            weight_on_input=spec.weight_on_input, **self._prepared,
            **do.sorted_for(self._tiles, self.lists),
        )  # fmt: skip

    def total(self) -> Tensor:
        """Sum each token's rows, [T, H]."""
        x_TH, _, ids_TK = self._inputs
        y_TH = x_TH.new_empty((x_TH.shape[0], self._rows_TKH.shape[2]))
        self._layer.operations.combine(self._rows_TKH, ids_TK, y_TH)
        return y_TH
