"""What a trace holds: hot experts, entropy, reuse distances, and a picture of them.

Legend: T tokens, L layers, K choices a token, E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.simulate.command import FILE_WIDTH
from vllm_moe_offload.simulate.policies import ALIAS, ENGINE_DEFAULT
from vllm_moe_offload.simulate.replay import replay
from vllm_moe_offload.trace import Trace

HOTTEST = 5
"""Experts named for each layer."""

CURVE_POINTS = 16
"""Cache sizes of the hit curve."""

CURVES = ("lru", ALIAS, "belady")


@dataclass(frozen=True)
class Reuse:
    """Tokens between two uses of an expert by its layer.

    ``quantiles`` are those of the uses that are not the first, by share; ``first`` is the
    share of first uses among all.
    """

    quantiles: dict[float, float]
    first: float


def expert_shares(trace: Trace) -> NDArray[np.float64]:
    """Share of each expert in the accesses of its layer, [L, E]."""
    layers, experts = trace.num_layers, trace.num_experts
    flat = np.arange(layers)[:, None] * experts + trace.expert_ids.astype(np.int64)
    counts = np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def layer_entropy(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of each layer's shares [L, E] in bits, at most log2(E)."""
    positive = np.where(shares > 0, shares, 1)
    # Zero less something keeps an even zero from reading -0.00.
    entropy: NDArray[np.float64] = 0 - (positive * np.log2(positive)).sum(1)
    return entropy


def reuse(trace: Trace) -> Reuse:
    """Measure how many tokens lie between two uses, over all layers."""
    tokens, layers, top_k = trace.expert_ids.shape
    experts = np.arange(layers)[:, None] * trace.num_experts + trace.expert_ids.astype(np.int64)
    when = np.repeat(np.arange(tokens), layers * top_k)
    order = np.argsort(experts.ravel(), kind="stable")
    same = np.diff(experts.ravel()[order]) == 0
    distances = np.diff(when[order])[same]
    shares = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    quantiles = np.quantile(distances, shares).tolist() if distances.size else []
    first = 1 - distances.size / max(1, experts.size)
    return Reuse(dict(zip(shares, quantiles, strict=False)), first)


def show(trace: Trace, path: Path) -> None:
    """Print what the trace holds."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(_contents(trace, path), markup=False)
    if not trace.num_tokens:
        return
    console.print(_layers_table(trace))
    found = reuse(trace)
    console.print(f"first uses: {found.first:.1%} of the accesses")
    if found.quantiles:
        texts = (f"{share:.0%} {tokens:.0f}" for share, tokens in found.quantiles.items())
        console.print(f"reuse distance in tokens, quantiles: {', '.join(texts)}")


def _contents(trace: Trace, path: Path) -> str:
    lengths = np.diff(trace.sequence_starts)
    decode = "not recorded" if trace.is_decode is None else f"{int(trace.is_decode.sum())}"
    spread = f" of {lengths.min()} to {lengths.max()} tokens" if lengths.size else ""
    lines = (
        f"{path}",
        f"model      {trace.model}",
        f"source     {trace.source}",
        f"layers     {trace.num_layers} of {trace.num_experts} experts, {trace.top_k} a token",
        f"sequences  {trace.num_sequences}{spread}",
        f"tokens     {trace.num_tokens}, of them decode steps: {decode}",
        f"accesses   {trace.expert_ids.size}",
    )
    return "\n".join(lines)


def _layers_table(trace: Trace) -> Table:
    shares = expert_shares(trace)
    entropy = layer_entropy(shares)
    quarter = max(1, trace.num_experts // 4)
    table = Table(box=box.SIMPLE)
    for title in ("layer", "entropy", "evenness", "hottest quarter", "unused"):
        table.add_column(title, justify="right")
    table.add_column("hot experts")
    for layer, row in enumerate(shares):
        hottest = np.argsort(-row, kind="stable")
        evenness = entropy[layer] / np.log2(trace.num_experts) if trace.num_experts > 1 else 1.0
        table.add_row(
            f"{layer}",
            f"{entropy[layer]:.2f}",
            f"{evenness:.0%}",
            f"{row[hottest[:quarter]].sum():.0%}",
            f"{int((row == 0).sum())}",
            ", ".join(f"{expert} ({row[expert]:.1%})" for expert in hottest[:HOTTEST]),
        )
    return table


def plot(trace: Trace, path: Path) -> None:
    """Draw the heat map of layers and experts, and hits against cache size.

    Raises:
        OffloadError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise OffloadError(
            "--plot", path, "it needs matplotlib", "Install vllm-moe-offload[plot]"
        ) from None
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    heat, curve = figure.subplots(1, 2)
    figure.suptitle(f"{trace.model}: {trace.num_tokens} tokens")
    _draw_heat(figure, heat, trace)
    _draw_curves(curve, trace)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise OffloadError("--plot", path, f"{error}", "Give a .png in a folder") from error


def _draw_heat(figure: Any, axes: Any, trace: Trace) -> None:
    use = expert_shares(trace) * trace.num_experts
    # A few experts far above the rest would leave these in the dark.
    image = axes.imshow(use, aspect="auto", vmin=0, vmax=float(np.quantile(use, 0.99)))
    axes.set(title="use of each expert, even use = 1", xlabel="expert", ylabel="MoE layer")
    figure.colorbar(image, ax=axes, extend="max")


def _draw_curves(axes: Any, trace: Trace) -> None:
    caches = [(point + 1) / CURVE_POINTS for point in range(CURVE_POINTS)]
    for policy in CURVES:
        result = replay(trace, policy, caches)
        ratios = [result.hit_ratio(place) for place in range(CURVE_POINTS)]
        label = f"{ENGINE_DEFAULT} (default)" if policy == ALIAS else policy
        axes.plot(caches, ratios, marker=".", label=label)
    axes.set(title="hits, one token at a time", xlabel="share of the experts in slots")
    axes.set(ylabel="hit ratio", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
