"""The experts' feed-forward network over slots that hold quantised weights.

Weights stay in their checkpoint's codes until a product reads them. Where a format rounds its
activations too, they are rounded before each product, as the format defines it.

Legend: T tokens, K choices a token, E local experts, S rows of experts, H hidden size,
I intermediate size, N columns of the first product, P pairs (T K), G groups of terms.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from vllm_moe_offload.kernels import gpu
from vllm_moe_offload.kernels._quantise_triton import quantise_pairs_kernel, quantise_rows_kernel
from vllm_moe_offload.kernels._quantised_mlp_triton import (
    quantised_down_kernel,
    quantised_gate_up_kernel,
)
from vllm_moe_offload.kernels.activation import Activation, activate_torch
from vllm_moe_offload.kernels.dispatch import Dispatch, max_blocks
from vllm_moe_offload.kernels.dispatch import dispatch as sort_pairs
from vllm_moe_offload.kernels.formats import (
    ExpertFormat,
    QuantisedMatrix,
    dequantise,
    quantise_torch,
)
from vllm_moe_offload.kernels.quantised_tiles import QuantisedTiles, quantised_tiles

SMALLEST_BLOCK = 16
"""Pairs of a block at least."""

ROUNDED_AT_ONCE = 2048
"""Values that a program rounds at most: rows one by one would make more programs than work."""


@dataclass(frozen=True)
class QuantisedWeights:
    """Both matrices of experts by row of a slot arena or a staging block."""

    format: ExpertFormat
    w13: QuantisedMatrix
    w2: QuantisedMatrix

    @classmethod
    def of(cls, form: ExpertFormat, views: dict[str, Tensor]) -> "QuantisedWeights":
        """Collect the tensors that ``ExpertFormat.tensors`` names."""

        def matrix(name: str) -> QuantisedMatrix:
            return QuantisedMatrix(
                codes=views[f"{name}_weight"],
                scale=views[f"{name}_scale"],
                zero=views.get(f"{name}_zero"),
                global_scale=views.get(f"{name}_global"),
                input_scale=views.get(f"{name}_input"),
                bias=views.get(f"{name}_bias"),
            )

        return cls(form, matrix("w13"), matrix("w2"))

    @property
    def num_rows(self) -> int:
        """Experts that fit."""
        return self.w13.codes.shape[0]

    @property
    def columns(self) -> int:
        """Rows of the first matrix."""
        return self.w13.codes.shape[1]

    @property
    def hidden(self) -> int:
        """Rows of the second matrix, which is the size of the result."""
        return self.w2.codes.shape[1]

    @property
    def intermediate(self) -> int:
        """Terms of the second matrix."""
        return self.w2.codes.shape[2] * 8 // self.format.bits

    def tiles(self, num_experts: int, num_pairs: int, dtype: torch.dtype) -> QuantisedTiles:
        """Tiles for a layer's experts and a step's pairs, see ``kernels.quantised_tiles``."""
        shared_bytes = gpu.shared_bytes(self.w13.codes.device)
        return quantised_tiles(self.format, num_experts, num_pairs, dtype, shared_bytes)


def quantised_mlp_torch(
    x_TH: Tensor,
    weight_TK: Tensor,
    ids_TK: Tensor,
    row_of_E: Tensor,
    weights: QuantisedWeights,
    activation: Activation,
    out_TKH: Tensor,
    *,
    weight_on_input: bool = False,
) -> None:
    """Compute the rows of all (token, choice) pairs whose expert has a row in ``weights``.

    The contract is that of ``expert_mlp.expert_mlp_torch``. Products are of decoded weights in
    float32 and are rounded to the type of ``x_TH`` once they are complete, the first one before
    its activation. A router weight on the input multiplies the first product before its bias.
    """
    rows = row_of_E.tolist()
    for expert in ids_TK.unique().tolist():
        if expert < 0 or rows[expert] < 0:
            continue
        t, k = (ids_TK == expert).nonzero(as_tuple=True)
        weight = weight_TK[t, k, None].float()
        form, row = weights.format, rows[expert]
        h = _product(x_TH[t], weights.w13, form, row)
        h = _biased(h * weight if weight_on_input else h, weights.w13, row).to(x_TH.dtype)
        y = _product(activate_torch(h, activation), weights.w2, form, row)
        y = _biased(y, weights.w2, row)
        out_TKH[t, k] = (y if weight_on_input else y * weight).to(out_TKH.dtype)


def _product(x: Tensor, matrix: QuantisedMatrix, form: ExpertFormat, row: int) -> Tensor:
    weights_NK = dequantise(matrix, form, row)
    if form.inputs is None:
        return x.float() @ weights_NK.T
    input_scale = None if matrix.input_scale is None else matrix.input_scale[row]
    codes, scale = quantise_torch(x, form.inputs, form.scale_terms, input_scale)
    group = form.scale_terms if form.inputs == "group" else x.shape[1]
    return (codes.float() * scale.repeat_interleave(group, 1)[:, : x.shape[1]]) @ weights_NK.T


def _biased(y: Tensor, matrix: QuantisedMatrix, row: int) -> Tensor:
    return y if matrix.bias is None else y + matrix.bias[row].float()


@dataclass(frozen=True)
class QuantisedInputs:
    """Hidden states as the first product reads them: e4m3 with scales [T, G], or as they were."""

    x_TH: Tensor
    scale_TG: Tensor | None = None


def quantise_inputs(x_TH: Tensor, form: ExpertFormat, tiles: QuantisedTiles) -> QuantisedInputs:
    """Round hidden states once for all products of a step, unless these do it or none is asked."""
    if form.inputs not in ("group", "token") or tiles.rounds_inside:
        return QuantisedInputs(x_TH)
    (tokens, hidden), group = x_TH.shape, _group(form, x_TH.shape[1])
    codes, scale_TG = _empty_inputs(tokens, hidden, group, x_TH.device)
    if tokens:
        options = _grouping(form, hidden)
        quantise_rows_kernel[(triton.cdiv(tokens, options["ROWS"]), scale_TG.shape[1])](
            x_TH, x_TH.stride(0), codes, scale_TG, tokens, **options
        )
    return QuantisedInputs(codes, scale_TG)


def _group(form: ExpertFormat, terms: int) -> int:
    return form.scale_terms if form.inputs == "group" else terms


def _empty_inputs(rows: int, terms: int, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = torch.empty((rows, terms), dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty((rows, -(-terms // group)), dtype=torch.float32, device=device)


def _grouping(form: ExpertFormat, terms: int) -> dict[str, Any]:
    group = _group(form, terms)
    block = triton.next_power_of_2(group)
    return {
        "WIDTH": terms, "GROUP": group, "BLOCK": block,
        "ROWS": max(1, min(SMALLEST_BLOCK, ROUNDED_AT_ONCE // block)),
        "OF_MAXIMUM": form.inputs == "group", "ROUND": _interpreted(), "num_warps": 4,
    }  # fmt: skip


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def quantised_mlp(
    x_TH: Tensor,
    weight_TK: Tensor,
    ids_TK: Tensor,
    row_of_E: Tensor,
    weights: QuantisedWeights,
    activation: Activation,
    out_TKH: Tensor,
    *,
    weight_on_input: bool = False,
    dispatch: Dispatch | None = None,
    config: QuantisedTiles | None = None,
    inputs: QuantisedInputs | None = None,
) -> None:
    """Do what ``quantised_mlp_torch`` does, in grouped products that decode their weights.

    Without rounded activations codes become values of the type of ``x_TH``, and scales of at
    least a tile's terms are applied to float32 sums. ``dispatch`` and ``config`` are those of
    ``expert_mlp.expert_mlp``; ``inputs`` are the hidden states from ``quantise_inputs``.
    """
    form, num_pairs, num_experts = weights.format, ids_TK.numel(), row_of_E.numel()
    if num_pairs == 0 or weights.num_rows == 0:
        return
    if config is None:
        config = weights.tiles(num_experts, num_pairs, x_TH.dtype)
    if dispatch is None:
        dispatch = Dispatch.empty(num_pairs, num_experts, config.block_m, x_TH.device)
        sort_pairs(ids_TK, dispatch)
    assert dispatch.block_m == config.block_m, "pairs were sorted for other tiles"
    inputs = quantise_inputs(x_TH, form, config) if inputs is None else inputs
    step = Step(x_TH, weight_TK, row_of_E, weights, activation, weight_on_input, dispatch, config)
    inner = step.between(step.gate_up(inputs))
    step.down(inner, out_TKH.view(num_pairs, weights.hidden))


@dataclass(frozen=True)
class Step:
    """The products of one step, one launch each. The arguments are those of ``quantised_mlp``."""

    x_TH: Tensor
    weight_TK: Tensor
    row_of_E: Tensor
    weights: QuantisedWeights
    activation: Activation
    weight_on_input: bool
    dispatch: Dispatch
    config: QuantisedTiles

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.weight_TK.numel()

    @property
    def num_blocks(self) -> int:
        """Most blocks of pairs that there can be."""
        return max_blocks(self.num_pairs, self.row_of_E.numel(), self.config.block_m)

    @property
    def _lists(self) -> tuple[Any, ...]:
        lists = self.dispatch
        pairs = lists.sorted_pair, lists.expert_of_block, lists.num_blocks
        return *pairs, self.row_of_E, self.num_pairs

    @property
    def _options(self) -> dict[str, Any]:
        config = self.config
        # With more registers a multiprocessor has no room for a second program of so many threads.
        registers = {"maxnreg": 128} if config.num_warps == 8 else {}
        return {
            "HIDDEN": self.weights.hidden, "INTERMEDIATE": self.weights.intermediate,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
            "GROUP_M": config.group_m, "SWAPPED": config.swapped, "UPCAST": _interpreted(),
            "num_warps": config.num_warps, "num_stages": config.num_stages, **registers,
        }  # fmt: skip

    def gate_up(self, inputs: QuantisedInputs) -> Tensor:
        """Run the first product and its activation, [P, I]."""
        weights, activation, form = self.weights, self.activation, self.weights.format
        hidden_PI = self.x_TH.new_empty(self.num_pairs, weights.intermediate)
        matrix, shapes = _arguments(
            weights.w13, form, weights.columns, weights.hidden, self.config.block_k
        )
        shapes["INPUTS"] = _rounding(inputs, form)
        tiles = triton.cdiv(weights.columns, self.config.block_n)
        quantised_gate_up_kernel[(self.num_blocks * tiles,)](
            *_terms(inputs.x_TH, form), *_strided(inputs.scale_TG), *matrix,
            hidden_PI, self.weight_TK.reshape(-1), *self._lists,
            CHOICES=self.weight_TK.shape[1], WEIGH=self.weight_on_input,
            PART_ROWS=_part_rows(weights), NAME=activation.name, GATED=activation.is_gated,
            INTERLEAVED=activation.name == "swigluoai",
            LIMIT=activation.limit, ALPHA=activation.alpha, BETA=activation.beta,
            SITU_BETA=activation.situ_beta, SITU_LINEAR_BETA=activation.situ_linear_beta,
            **shapes, **self._options,
        )  # fmt: skip
        return hidden_PI

    def between(self, hidden_PI: Tensor) -> QuantisedInputs:
        """Round what lies between the products, unless these do it or none is asked."""
        form, intermediate = self.weights.format, self.weights.intermediate
        if form.inputs not in ("group", "token") or self.config.rounds_inside:
            return QuantisedInputs(hidden_PI)
        codes, scale_PG = _empty_inputs(
            self.num_pairs, intermediate, _group(form, intermediate), hidden_PI.device
        )
        options = _grouping(form, intermediate)
        programs = self.num_blocks * self.config.block_m // options["ROWS"]
        quantise_pairs_kernel[(programs, scale_PG.shape[1])](
            hidden_PI, codes, scale_PG, *self._lists, BLOCK_M=self.config.block_m, **options
        )
        return QuantisedInputs(codes, scale_PG)

    def down(self, inner: QuantisedInputs, out_PH: Tensor) -> None:
        """Run the second product, into rows of pairs."""
        weights, form = self.weights, self.weights.format
        matrix, shapes = _arguments(
            weights.w2, form, weights.hidden, weights.intermediate, self.config.block_k
        )
        shapes["INPUTS"] = _rounding(inner, form)
        tiles = triton.cdiv(weights.hidden, self.config.block_n)
        quantised_down_kernel[(self.num_blocks * tiles,)](
            *_terms(inner.x_TH, form), *_strided(inner.scale_TG), *matrix,
            out_PH, out_PH.stride(0), self.weight_TK.reshape(-1), *self._lists,
            WEIGH=not self.weight_on_input, **shapes, **self._options,
        )  # fmt: skip


def _terms(x_RK: Tensor, form: ExpertFormat) -> tuple[Tensor, int]:
    """Activations and their stride as the products read them, next to 4-bit codes in words."""
    if form.bits == 4 and x_RK.element_size() == 2:
        pairs = x_RK.stride(0) % 2 == x_RK.storage_offset() % 2 == 0 and x_RK.stride(1) == 1
        x_RK = (x_RK if pairs else x_RK.clone()).view(torch.int32)
    return x_RK, x_RK.stride(0)


def _rounding(inputs: QuantisedInputs, form: ExpertFormat) -> str:
    """How a product rounds its activations, or finds them rounded."""
    if form.inputs == "group" and inputs.scale_TG is None:
        return "group here"
    return form.inputs or "none"


def _part_rows(weights: QuantisedWeights) -> int:
    parts = weights.w13.global_scale
    return weights.columns if parts is None else weights.columns // parts.shape[1]


def _arguments(
    matrix: QuantisedMatrix, form: ExpertFormat, rows: int, terms: int, block_k: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tensors of a matrix with their strides, and what the kernel is compiled for."""
    assert matrix.codes.stride(-1) == matrix.scale.stride(-1) == 1
    codes = matrix.codes if form.inputs else matrix.codes.view(torch.uint8)
    # One scale for all terms is one for as many as a tile has, or more.
    scale_terms = form.scale_terms
    if not 0 < scale_terms < terms:
        scale_terms = max(terms, block_k)
    fits = scale_terms >= terms or scale_terms % block_k == 0 or block_k % scale_terms == 0
    assert fits, "scales would cross tiles"
    assert form.inputs != "group" or form.scale_terms == block_k, "activations need these tiles"
    tensors = (
        codes, *codes.stride()[:2], *_rows_of(matrix.zero, 2), _readable(matrix.scale),
        *matrix.scale.stride()[:2], *_rows_of(matrix.global_scale, 1),
        *_rows_of(_column(matrix.input_scale), 1), *_rows_of(matrix.bias, 1),
    )  # fmt: skip
    return tensors, {
        "ELEMENTS": form.elements, "ZERO": form.midpoint,
        "SCALE_ROWS": form.scale_rows or rows // matrix.scale.shape[1],
        "SCALE_TERMS": scale_terms,
    }  # fmt: skip


def _readable(scale: Tensor) -> Tensor:
    """Scales in a type that kernels take on their device: signed bytes stand for e4m3."""
    is_unknown = scale.dtype == torch.float8_e4m3fn and not gpu.has_e4m3(scale.device)
    return scale.view(torch.int8) if is_unknown else scale


def _column(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[:, None]


def _rows_of(tensor: Tensor | None, strides: int) -> tuple[Any, ...]:
    """A tensor and its first strides, or nothing in their place."""
    if tensor is None:
        return (None, *[0] * strides)
    assert tensor.stride(-1) == 1, "weights must be contiguous along their last dimension"
    return tensor, *tensor.stride()[:strides]


def _strided(tensor: Tensor | None) -> tuple[Any, ...]:
    return _rows_of(tensor, 1)
