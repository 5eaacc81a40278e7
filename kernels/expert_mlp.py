"""The experts' feed-forward network over slots, and the sum over a token's choices.

Legend: T tokens, K choices a token, E local experts, S slots or staging rows, H hidden size,
I intermediate size, N columns of the first product (2 I if gated, else I), P pairs (T K).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from torch import Tensor

from vllm_moe_offload.kernels._expert_mlp_triton import (
    combine_kernel,
    down_kernel,
    gate_up_kernel,
)
from vllm_moe_offload.kernels.activation import Activation, activate_torch
from vllm_moe_offload.kernels.dispatch import Dispatch, max_blocks
from vllm_moe_offload.kernels.dispatch import dispatch as sort_pairs

COMBINE_BLOCK_H = 1024
"""Columns a program of ``combine`` sums: 16-byte loads for 128 threads of 16-bit values."""


@dataclass(frozen=True)
class ExpertWeights:
    """Weights by row of a slot arena or a staging block; strided views are fine."""

    w13_SNH: Tensor
    w2_SHI: Tensor
    b13_SN: Tensor | None = None
    b2_SH: Tensor | None = None

    @property
    def hidden(self) -> int:
        """Size of the result."""
        return self.w2_SHI.shape[1]

    def tiles(self, num_experts: int, num_pairs: int, dtype: torch.dtype) -> "TileConfig":
        """Tiles for a layer's experts and a step's pairs, see ``tile_config``."""
        _, columns, hidden = self.w13_SNH.shape
        return tile_config(num_experts, columns, hidden, num_pairs, dtype)


@dataclass(frozen=True)
class TileConfig:
    """How the two products are cut into programs; ``block_n`` counts gate and up alike."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    @classmethod
    def from_table(cls, entry: Mapping[str, int]) -> "TileConfig":
        """Read an entry of a tuned table in the format that vLLM ships."""
        return cls(
            block_m=entry["BLOCK_SIZE_M"],
            block_n=entry["BLOCK_SIZE_N"],
            block_k=entry["BLOCK_SIZE_K"],
            group_m=entry["GROUP_SIZE_M"],
            num_warps=entry.get("num_warps", 4),
            num_stages=entry.get("num_stages", 3),
        )


def tile_config(
    num_experts: int, columns: int, hidden: int, num_pairs: int, dtype: torch.dtype
) -> TileConfig:
    """Choose tiles from shapes alone: what is resident may not change a result's bits.

    Args:
        num_experts: E.
        columns: N.
        hidden: H.
        num_pairs: P, active or not.
        dtype: of hidden states and weights.
    """
    pairs_per_expert = num_pairs / num_experts
    smallest = min(columns, hidden)
    if dtype == torch.float32:
        # Full precision has no tensor cores to feed, and its terms take twice the memory.
        block_m = 16 if pairs_per_expert <= 16 else 32
        return TileConfig(block_m, min(64, _fitting(smallest)), 32, 1, 4, 2)
    if pairs_per_expert <= 16:
        # Bound by reading the weights: narrow tiles make many programs, long terms long reads.
        return TileConfig(16, min(64, _fitting(smallest)), 128, 1, 4, 4)
    if pairs_per_expert <= 64:
        block_m = 32 if pairs_per_expert <= 32 else 64
        return TileConfig(block_m, min(128, _fitting(smallest)), 64, 1, 4, 4)
    return TileConfig(128, min(128, _fitting(smallest)), 64, 8, 8, 3)


def _fitting(columns: int) -> int:
    return max(32, int(triton.next_power_of_2(columns)))


def expert_mlp_torch(
    x_TH: Tensor,
    weight_TK: Tensor,
    ids_TK: Tensor,
    row_of_E: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    out_TKH: Tensor,
    *,
    weight_on_input: bool = False,
) -> None:
    """Compute the rows of all (token, choice) pairs whose expert has a row in ``weights``.

    ``out[t, k] = weight[t, k] * (w2[s] @ act(w13[s] @ x[t] + b13[s]) + b2[s])`` with
    ``s = row_of_E[ids[t, k]]``. A pair is computed together with all other pairs of its expert
    and with nothing else, so its bits depend on the routing and never on which experts happen
    to be resident.

    Args:
        x_TH: hidden states.
        weight_TK: router weights, float.
        ids_TK: local expert ids; negative ones are inactive.
        row_of_E: int32 [E], row of each expert in ``weights``, or -1 if it is not there.
        weights: the experts' weights by row.
        activation: what stands between the two products.
        out_TKH: written where the expert has a row, left alone elsewhere.
        weight_on_input: multiply the router weight into ``x`` instead of the result.
    """
    rows = row_of_E.tolist()
    for expert in ids_TK.unique().tolist():
        if expert < 0 or rows[expert] < 0:
            continue
        t, k = (ids_TK == expert).nonzero(as_tuple=True)
        weight = weight_TK[t, k, None].float()
        x = (x_TH[t].float() * weight).to(x_TH.dtype) if weight_on_input else x_TH[t]
        y = _mlp(x, rows[expert], weights, activation)
        out_TKH[t, k] = y if weight_on_input else (y.float() * weight).to(y.dtype)


def _mlp(x: Tensor, row: int, weights: ExpertWeights, activation: Activation) -> Tensor:
    b13 = None if weights.b13_SN is None else weights.b13_SN[row]
    b2 = None if weights.b2_SH is None else weights.b2_SH[row]
    h = activate_torch(F.linear(x, weights.w13_SNH[row], b13), activation)
    return F.linear(h, weights.w2_SHI[row], b2)


def expert_mlp(
    x_TH: Tensor,
    weight_TK: Tensor,
    ids_TK: Tensor,
    row_of_E: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    out_TKH: Tensor,
    *,
    weight_on_input: bool = False,
    dispatch: Dispatch | None = None,
    config: TileConfig | None = None,
) -> None:
    """Do what ``expert_mlp_torch`` does, in two launches of grouped products.

    Both products are summed in float32 and rounded once, the first after its activation.
    ``dispatch`` holds the same ids sorted in blocks of ``config.block_m``; None sorts them here.
    Without a ``config`` the tiles are those of ``tile_config``.
    """
    num_pairs, num_experts = ids_TK.numel(), row_of_E.numel()
    (_, columns, hidden), intermediate = weights.w13_SNH.shape, weights.w2_SHI.shape[2]
    if num_pairs == 0 or weights.w13_SNH.shape[0] == 0:
        return
    if config is None:
        config = tile_config(num_experts, columns, hidden, num_pairs, x_TH.dtype)
    if dispatch is None:
        dispatch = Dispatch.empty(num_pairs, num_experts, config.block_m, x_TH.device)
        sort_pairs(ids_TK, dispatch)
    assert dispatch.block_m == config.block_m, "pairs were sorted for other tiles"
    weight_P = weight_TK.reshape(-1)
    hidden_PI = x_TH.new_empty(num_pairs, intermediate)
    blocks = max_blocks(num_pairs, num_experts, config.block_m)
    lists = (
        dispatch.sorted_pair, dispatch.expert_of_block, dispatch.num_blocks, row_of_E, num_pairs
    )  # fmt: skip
    options = {
        "HIDDEN": hidden, "INTERMEDIATE": intermediate,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
        # Tensors on the host mean Triton's interpreter, which multiplies no bfloat16.
        "UPCAST": x_TH.device.type == "cpu" and x_TH.dtype == torch.bfloat16,
    }  # fmt: skip
    gate_up_kernel[(blocks * triton.cdiv(columns, config.block_n),)](
        x_TH, x_TH.stride(0), *_strided(weights.w13_SNH), *_strided(weights.b13_SN),
        hidden_PI, weight_P, *lists,
        CHOICES=ids_TK.shape[1], WEIGH=weight_on_input,
        NAME=activation.name, GATED=activation.is_gated,
        INTERLEAVED=activation.name == "swigluoai",
        LIMIT=activation.limit, ALPHA=activation.alpha, BETA=activation.beta,
        SITU_BETA=activation.situ_beta, SITU_LINEAR_BETA=activation.situ_linear_beta,
        **options,
    )  # fmt: skip
    out_PH = out_TKH.view(num_pairs, hidden)
    down_kernel[(blocks * triton.cdiv(hidden, config.block_n),)](
        hidden_PI, *_strided(weights.w2_SHI), *_strided(weights.b2_SH),
        out_PH, out_PH.stride(0), weight_P, *lists, WEIGH=not weight_on_input,
        **options,
    )  # fmt: skip


def _strided(tensor: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """A tensor and all its strides but the last, which must be one."""
    if tensor is None:
        return None, 0
    assert tensor.stride(-1) == 1, "weights must be contiguous along their last dimension"
    return tensor, *tensor.stride()[:-1]


def combine_torch(rows_TKH: Tensor, ids_TK: Tensor, y_TH: Tensor) -> None:
    """Sum each token's rows in choice order, in float32, rounded once.

    Args:
        rows_TKH: one row a (token, choice); rows of inactive choices are never read.
        ids_TK: local expert ids; negative ones are inactive.
        y_TH: overwritten with the sums; zero for a token without an active choice.
    """
    active_TK1 = (ids_TK >= 0).unsqueeze(-1)
    total_TH = rows_TKH.new_zeros(y_TH.shape).float()
    for k in range(rows_TKH.shape[1]):
        total_TH += rows_TKH[:, k].float().masked_fill(~active_TK1[:, k], 0.0)
    y_TH.copy_(total_TH)


def combine(rows_TKH: Tensor, ids_TK: Tensor, y_TH: Tensor) -> None:
    """Do what ``combine_torch`` does, in one launch."""
    (tokens, choices, hidden) = rows_TKH.shape
    if tokens == 0:
        return
    rows_PH = rows_TKH.view(tokens * choices, hidden)
    block_h = min(COMBINE_BLOCK_H, triton.next_power_of_2(hidden))
    combine_kernel[(tokens, triton.cdiv(hidden, block_h))](
        rows_PH, rows_PH.stride(0), ids_TK.reshape(-1), y_TH, y_TH.stride(0),
        HIDDEN=hidden, CHOICES=choices, BLOCK_H=block_h,
    )  # fmt: skip
