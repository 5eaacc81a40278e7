"""Which form of the operations runs where: Triton on a GPU, plain torch elsewhere."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_moe_offload.kernels import (
    expert_mlp,
    gather,
    learn,
    predict,
    prefetch,
    quantised_mlp,
    resolve,
    tally,
)
from vllm_moe_offload.kernels.dispatch import Dispatch
from vllm_moe_offload.kernels.expert_mlp import TileConfig
from vllm_moe_offload.kernels.formats import ExpertFormat
from vllm_moe_offload.kernels.quantised_tiles import QuantisedTiles


@dataclass(frozen=True)
class Operations:
    """The operations of a step, with the contracts of their torch forms."""

    resolve: Callable[..., None]
    wave_map: Callable[..., None]
    tally: Callable[..., None]
    gather: Callable[..., None]
    expert_mlp: Callable[..., None]
    quantised_mlp: Callable[..., None]
    combine: Callable[..., None]
    learn: Callable[..., None]
    look_ahead: Callable[..., None]
    learn_transitions: Callable[..., None]
    sorts_pairs: bool
    """Whether the products want their pairs sorted by expert, which resolve then does."""

    def products(
        self, form: ExpertFormat | None, x_TH: Tensor, tiles: TileConfig | None
    ) -> tuple[Callable[..., None], dict[str, Any]]:
        """The products of a format, and what they want prepared once a step."""
        if form is None:
            return self.expert_mlp, {}
        if not self.sorts_pairs:
            return self.quantised_mlp, {}
        assert isinstance(tiles, QuantisedTiles)
        return self.quantised_mlp, {"inputs": quantised_mlp.quantise_inputs(x_TH, form, tiles)}

    def sorted_for(self, tiles: TileConfig | None, lists: Dispatch | None) -> dict[str, Any]:
        """Arguments that hand a step's sorted pairs to ``expert_mlp``."""
        return {"dispatch": lists, "config": tiles} if self.sorts_pairs else {}


TORCH = Operations(
    resolve=resolve.resolve_torch,
    wave_map=resolve.wave_map_torch,
    tally=tally.tally_torch,
    gather=gather.gather_torch,
    expert_mlp=expert_mlp.expert_mlp_torch,
    quantised_mlp=quantised_mlp.quantised_mlp_torch,
    combine=expert_mlp.combine_torch,
    learn=learn.learn_torch,
    look_ahead=prefetch.look_ahead_torch,
    learn_transitions=predict.learn_transitions_torch,
    sorts_pairs=False,
)

TRITON = Operations(
    resolve=resolve.resolve,
    wave_map=resolve.wave_map,
    tally=tally.tally,
    gather=gather.gather,
    expert_mlp=expert_mlp.expert_mlp,
    quantised_mlp=quantised_mlp.quantised_mlp,
    combine=expert_mlp.combine,
    learn=learn.learn,
    look_ahead=prefetch.look_ahead,
    learn_transitions=predict.learn_transitions,
    sorts_pairs=True,
)


def operations_for(device: torch.device) -> Operations:
    """Triton on a GPU and in Triton's interpreter (``TRITON_INTERPRET=1``), else torch."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return TRITON if device.type == "cuda" or interpreted else TORCH
