"""How the products over quantised experts are cut into programs.

The choices for 16-bit activations are the quickest of those that ``benchmarks/quantised_layers.py``
times on a GPU. What was not timed, such as 8-bit integers, follows what resembles it.

Legend: P pairs of a step, E experts of a layer.
"""

from dataclasses import dataclass

import torch

from vllm_moe_offload.kernels.expert_mlp import TileConfig
from vllm_moe_offload.kernels.formats import ExpertFormat
from vllm_moe_offload.kernels.gpu import MOST_SHARED_BYTES

STATIC_BYTES = 128 * 1024
"""Shared memory of the largest tiles whose activations come in 16 bits and are rounded inside."""


@dataclass(frozen=True)
class QuantisedTiles(TileConfig):
    """Tiles of both products.

    With ``rounds_inside`` the products round their activations themselves, once for every tile of
    columns; otherwise kernels of their own do it once, in two more launches. ``swapped`` products
    over 4-bit codes compute the transpose, for which 8 pairs are enough to fill the tensor cores.
    """

    rounds_inside: bool = False
    swapped: bool = False


def quantised_tiles(
    form: ExpertFormat,
    num_experts: int,
    num_pairs: int,
    dtype: torch.dtype,
    shared_bytes: int = MOST_SHARED_BYTES,
) -> QuantisedTiles:
    """Choose tiles from shapes and the GPU: what is resident may not change a result's bits.

    Args:
        form: how the weights are stored.
        num_experts: E.
        num_pairs: P, active or not.
        dtype: of the hidden states.
        shared_bytes: shared memory that a program may have.
    """
    pairs_per_expert = num_pairs / num_experts
    if dtype == torch.float32:
        block_m = 16 if pairs_per_expert <= 16 else 32
        return QuantisedTiles(block_m, 32, _terms(form, 32), 1, 4, 2)
    if pairs_per_expert <= 16:
        return _for_few_pairs(form, pairs_per_expert)
    # Decoding takes registers: more terms at once would spill.
    block_k = _terms(form, 128 if form.inputs else 64)
    if pairs_per_expert <= 64:
        block_m = 32 if pairs_per_expert <= 32 else 64
        return QuantisedTiles(block_m, 128, block_k, 1, 4, 3)
    if form.inputs == "group":
        # Sums of a group stand in registers beside those of all groups.
        return QuantisedTiles(64, 128, block_k, 8, 4, 3)
    if form.inputs == "static" and shared_bytes < STATIC_BYTES:
        block_k = _terms(form, 64)
    return QuantisedTiles(128, 128, block_k, 8, 8, 3)


def _for_few_pairs(form: ExpertFormat, pairs_per_expert: float) -> QuantisedTiles:
    """Tiles of steps that are bound by reading the weights, and by decoding them."""
    block_k = _terms(form, 128)
    # Hardly an expert has more than 8 pairs.
    few = form.bits == 4 and pairs_per_expert <= 4
    if form.elements == "e2m1":
        if few:
            return QuantisedTiles(8, 64, _terms(form, 256), 1, 4, 3, swapped=True)
        return QuantisedTiles(16, 128, block_k, 1, 4, 3)
    if form.bits == 4:
        # Every warp takes the activations' even and odd terms apart for itself.
        return QuantisedTiles(8 if few else 16, 64, block_k, 1, 2, 6 if few else 4, swapped=True)
    if form.inputs == "group" and pairs_per_expert > 4:
        return QuantisedTiles(16, 128, block_k, 1, 4, 3, rounds_inside=True)
    return QuantisedTiles(16, 64, block_k, 1, 2 if form.inputs and pairs_per_expert > 1 else 4, 4)


def _terms(form: ExpertFormat, wanted: int) -> int:
    """Terms of a tile: those of a scale of the activations, or such that scales do not cross."""
    if form.inputs == "group":
        return form.scale_terms
    return min(wanted, form.scale_terms) if form.scale_terms >= 64 else wanted
