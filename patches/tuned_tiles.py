"""vLLM's tuned tiles for a layer's shape.

Reads: ``try_get_optimal_moe_config`` in vllm.model_executor.layers.fused_moe.fused_moe.
Versions: 0.32, 0.33.
Why: vLLM ships tables measured on many GPUs, and our grouped product is cut the same way.
How: ask for the shape with all experts, never with the slots, so that tiles do not depend on
    what is resident; entries are looked up once a number of tokens.
Can go: when the project ships tables of its own.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from vllm_moe_offload.kernels.expert_mlp import TileConfig


def tuned_tiles(moe_config: Any) -> Callable[[int], TileConfig] | None:
    """Tiles by number of tokens, or None where vLLM's tables do not apply.

    Args:
        moe_config: vLLM's configuration of the layer; its sizes are read at the first step,
            when they are final.
    """
    if moe_config.device.type != "cuda" or moe_config.in_dtype == torch.float32:
        return None

    @cache
    def tiles(num_tokens: int) -> TileConfig:
        from vllm.model_executor.layers.fused_moe.fused_moe import try_get_optimal_moe_config

        experts, hidden = moe_config.num_local_experts, moe_config.hidden_dim
        intermediate = moe_config.intermediate_size_per_partition
        columns = intermediate * (2 if moe_config.is_act_and_mul else 1)
        entry = try_get_optimal_moe_config(
            (experts, columns, hidden),
            (experts, hidden, intermediate),
            moe_config.experts_per_token,
            None,
            num_tokens,
        )
        return TileConfig.from_table(entry)

    return tiles
