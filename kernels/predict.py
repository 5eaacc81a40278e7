"""What the next layer will be asked for: each token's expected experts, added up over a step.

All of it is in integers, so that the torch form and the kernel come to the same bits, in any order
of the tokens: logarithms to base 2 in ``1 / 2 ** FRACTION_BITS``, demand in ``1 / ONE`` experts.

Legend: T tokens, K choices a token, L layers, E experts of a layer, N stored matrices, M tokens of
the largest step that is predicted.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from vllm_moe_offload.kernels._predict_triton import demand_kernel, learn_transitions_kernel
from vllm_moe_offload.kernels.fixed_point import (
    EXPERT_BITS,
    FRACTION_BITS,
    FULL_WEIGHT_BITS,
    HALF_SHIFT,
    LARGEST_SHIFT,
    LIMIT,
    ONE,
    ONE_BITS,
    RECENT_BITS,
    RECENT_CHOICE_BITS,
    RECENT_FADE,
    RECENT_GAIN,
    ROUNDS,
)

MAX_EXPERTS = 1 << EXPERT_BITS


def powers(device: torch.device) -> Tensor:
    """Weights of one binary order: entry i is 2 ** (20 - i / 256)."""
    steps = torch.arange(1 << FRACTION_BITS, dtype=torch.float64)
    values = torch.exp2(FULL_WEIGHT_BITS - steps / (1 << FRACTION_BITS))
    return values.round().int().to(device)


@dataclass(frozen=True)
class MarkovTables:
    """Transitions from layer to layer, see ``predictors.markov``.

    ``evidence_LEE`` (int16 [L-1, E, E]) is what an expert of a layer says about those of the next;
    ``prior_LE`` (int32) what is known without it, and ``bias_LE`` (int32) that plus recent use.
    ``count_LEE`` (int32 [L-1, E, E]), ``use_LE`` and ``recent_LE`` (int32) and ``tokens`` (int64
    [1]) are what a step adds to. ``of_recent`` is the logarithm of a recent use.
    """

    evidence_LEE: Tensor
    prior_LE: Tensor
    bias_LE: Tensor
    count_LEE: Tensor
    use_LE: Tensor
    recent_LE: Tensor
    tokens: Tensor
    of_recent: Tensor
    powers: Tensor


@dataclass(frozen=True)
class EamTables:
    """A collection of activation matrices, see ``predictors.eam``.

    ``counts_LEN`` (int16) are the matrices, of which the first ``size`` (int32 [1]) are valid;
    ``inverse_norm_LN`` (float32) belongs to each matrix up to and with a layer. ``product_MN``
    (int32) is carried from layer to layer within a step.
    """

    counts_LEN: Tensor
    inverse_norm_LN: Tensor
    size: Tensor
    product_MN: Tensor


@dataclass(frozen=True)
class GateLogits:
    """What the next layer's router says about this layer's hidden states, [T, E] floats."""

    logits_TE: Tensor
    powers: Tensor


Source = MarkovTables | EamTables | GateLogits


def demand_torch(ids_TK: Tensor, source: Source, layer: int) -> Tensor:
    """Add up the tokens' expected demand for the experts of the layer after ``layer``.

    A token is expected to choose as many experts there as it chose here, each once. Markov and EAM
    share them out in proportion; where an expert would get more than one, the others get the rest,
    as in sampling with unequal probabilities without replacement. A gate's answer is nearly the
    choice itself: the K best experts are wanted with one half or more, the more the further they
    are from the border between the chosen and the others, as if that distance had Laplace noise of
    one binary order.

    Args:
        ids_TK: routed local expert ids of ``layer``; negative ones are inactive.
        source: the predictor's tables.
        layer: number of the layer whose ids these are.

    Returns:
        int32 [E], in ``1 / ONE`` experts.
    """
    ids_TK = ids_TK.long()
    count_T1 = (ids_TK >= 0).sum(1, keepdim=True)
    if isinstance(source, GateLogits):
        demand_TE = _by_margin(source, ids_TK.shape[1])
    elif isinstance(source, MarkovTables):
        weight_TE = _weights(_markov_logits(ids_TK, source, layer), source.powers)
        demand_TE = _share_out(weight_TE, count_T1)
    else:
        demand_TE = _share_out(_matched_counts(ids_TK, source, layer), count_T1)
    return torch.where(count_T1 > 0, demand_TE, 0).sum(0).int()


def _share_out(weight_TE: Tensor, count_T1: Tensor) -> Tensor:
    """Give each expert its part of the count, at most one, int64 [T, E]."""
    is_full_TE = torch.zeros_like(weight_TE, dtype=torch.bool)
    for _ in range(ROUNDS):
        left_TE = torch.where(is_full_TE, 0, weight_TE)
        left_T1 = (count_T1 - is_full_TE.sum(1, keepdim=True)).clamp(min=0)
        scale_T1 = (left_T1 << 40) // left_TE.sum(1, keepdim=True).clamp(min=1)
        part_TE = (left_TE * scale_T1) >> (40 - ONE_BITS)
        is_full_TE |= part_TE >= ONE
    return torch.where(is_full_TE, ONE, part_TE)


def _markov_logits(ids_TK: Tensor, tables: MarkovTables, layer: int) -> Tensor:
    """Sum the evidence of a token's experts, int64 [T, E]."""
    rows_TKE = tables.evidence_LEE[layer][ids_TK.clamp(min=0)].long()
    evidence_TE = torch.where((ids_TK >= 0)[..., None], rows_TKE, 0).sum(1)
    return evidence_TE + tables.bias_LE[layer + 1].long()


def _weights(logit_TE: Tensor, of_fraction: Tensor) -> Tensor:
    return _power(logit_TE.amax(1, keepdim=True) - logit_TE, of_fraction)


def _power(down: Tensor, of_fraction: Tensor) -> Tensor:
    """Two to the power of minus ``down``, which is not negative, int64."""
    fraction = down & ((1 << FRACTION_BITS) - 1)
    return of_fraction[fraction].long() >> (down >> FRACTION_BITS).clamp(max=LARGEST_SHIFT)


def _matched_counts(ids_TK: Tensor, tables: EamTables, layer: int) -> Tensor:
    """Counts of the next layer in the matrix most similar to each token so far, int64 [T, E]."""
    tokens = ids_TK.shape[0]
    rows_TKN = tables.counts_LEN[layer][ids_TK.clamp(min=0)].int()
    product_TN = torch.where((ids_TK >= 0)[..., None], rows_TKN, 0).sum(1, dtype=torch.int32)
    if layer > 0:
        product_TN += tables.product_MN[:tokens]
    tables.product_MN[:tokens] = product_TN
    similarity_TN = product_TN.float() * tables.inverse_norm_LN[layer]
    number_N = torch.arange(similarity_TN.shape[1], device=ids_TK.device)
    is_stored_N = number_N < tables.size
    best_T = torch.where(is_stored_N, similarity_TN, -1.0).argmax(1)
    counts_TE = tables.counts_LEN[layer + 1][:, best_T].T.long()
    return torch.where(tables.size > 0, counts_TE, 0)


def _by_margin(source: GateLogits, top_k: int) -> Tensor:
    """Chance of each expert to be among the chosen, int64 [T, E]."""
    scaled_TE = source.logits_TE.float() * (1 << FRACTION_BITS)
    logit_TE = (scaled_TE.clamp(-LIMIT, LIMIT) + 0.5).floor().long()
    border_T1 = logit_TE.sort(1, descending=True).values[:, top_k - 1 : top_k]
    margin_TE = logit_TE - border_T1
    half_TE = _power(margin_TE.abs(), source.powers) >> HALF_SHIFT
    return torch.where(margin_TE >= 0, ONE - half_TE, half_TE)


def demand(ids_TK: Tensor, source: Source, layer: int, demand_E: Tensor, rows: Tensor) -> None:
    """Add what ``demand_torch`` returns to ``demand_E``, in one launch of a program a token.

    Nothing is added where ``rows`` (int32 [1]) is negative.
    """
    tokens, top_k = ids_TK.shape
    if tokens == 0:
        return
    tables, sizes = arguments(source, layer, demand_E.numel())
    demand_kernel[(tokens,)](
        ids_TK.contiguous(), demand_E, rows, *tables, K=top_k, **sizes,
        num_warps=num_warps(source, demand_E.numel()),
    )  # fmt: skip


def arguments(
    source: Source, layer: int, experts: int
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """The source as the kernels take it: four tables, and sizes known when they are compiled."""
    assert experts <= MAX_EXPERTS, f"{experts} experts, at most {MAX_EXPERTS}"
    sizes: dict[str, Any] = {
        "E": experts,
        "E2": max(32, triton.next_power_of_2(experts)),
        "N": 1,
        "FIRST": False,
    }
    tables: list[Tensor | None]
    if isinstance(source, MarkovTables):
        tables = [source.evidence_LEE[layer], source.bias_LE[layer + 1], source.powers, None]
        return tables, {**sizes, "KIND": "markov"}
    if isinstance(source, GateLogits):
        return [source.logits_TE.contiguous(), None, source.powers, None], {**sizes, "KIND": "gate"}
    # Both layers' counts are reached from the first of them.
    tables = [source.counts_LEN[layer], source.inverse_norm_LN[layer], source.size,
              source.product_MN]  # fmt: skip
    matrices = source.inverse_norm_LN.shape[1]
    assert matrices == triton.next_power_of_2(matrices), "a power of two of matrices"
    return tables, {**sizes, "KIND": "eam", "N": matrices, "FIRST": layer == 0}


def num_warps(source: Source, experts: int) -> int:
    """Enough threads for a row of the tables, few enough to wait little for each other."""
    wide = max(experts, source.inverse_norm_LN.shape[1] if isinstance(source, EamTables) else 0)
    return 4 if wide <= 256 else 8


def learn_transitions_torch(ids_LTK: Tensor, num_tokens: int, tables: MarkovTables) -> None:
    """Count a step: transitions, uses, recent uses and the bias that follows from them.

    Args:
        ids_LTK: int32 [L, M, K], routed ids of all layers; negative ones are inactive.
        num_tokens: how many rows of it the step has written.
        tables: updated in place, but for the evidence and the prior.
    """
    ids_LTK = ids_LTK[:, :num_tokens].long()
    layers, experts = tables.use_LE.shape
    layer_L11 = torch.arange(layers, device=ids_LTK.device)[:, None, None]
    is_active_LTK = ids_LTK >= 0
    both = is_active_LTK[:-1, :, :, None] & is_active_LTK[1:, :, None, :]
    from_layer = layer_L11[:-1, ..., None].expand(both.shape)[both]
    before = ids_LTK[:-1, :, :, None].expand(both.shape)[both]
    after = ids_LTK[1:, :, None, :].expand(both.shape)[both]
    place = (from_layer * experts + before) * experts + after
    tables.count_LEE.view(-1).index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
    used = (layer_L11 * experts + ids_LTK)[is_active_LTK]
    uses_LE = torch.bincount(used, minlength=layers * experts).view(layers, experts).int()
    tables.use_LE.add_(uses_LE)
    tables.tokens.add_(is_active_LTK[0].any(1).sum())
    faded_LE = (tables.recent_LE * RECENT_FADE) >> RECENT_BITS
    tables.recent_LE.copy_(faded_LE + RECENT_GAIN * (uses_LE > 0))
    choice_LE = tables.recent_LE >> (RECENT_BITS - RECENT_CHOICE_BITS)
    tables.bias_LE.copy_(tables.prior_LE + tables.of_recent[choice_LE.long()])


def learn_transitions(ids_LTK: Tensor, num_tokens: int, tables: MarkovTables) -> None:
    """Do what ``learn_transitions_torch`` does, in one launch of a program a layer."""
    layers, experts = tables.use_LE.shape
    _, stride, top_k = ids_LTK.shape
    learn_transitions_kernel[(layers,)](
        ids_LTK, num_tokens, stride, tables.count_LEE, tables.use_LE, tables.recent_LE,
        tables.prior_LE, tables.bias_LE, tables.of_recent, tables.tokens, layers,
        E=experts, E2=max(32, triton.next_power_of_2(experts)),
        K=top_k, K2=triton.next_power_of_2(top_k), num_warps=4,
    )  # fmt: skip
