"""Foresight: from the options to a predictor and what it fetches, or to why that cannot be."""

from collections.abc import Callable, Sequence

import torch

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.offloaded_layer import LayerSpec, OffloadedLayer
from vllm_moe_offload.predictors.eam import EamPredictor
from vllm_moe_offload.predictors.gate import GatePredictor, Router
from vllm_moe_offload.predictors.markov import MarkovPredictor
from vllm_moe_offload.predictors.predictor import Predictor
from vllm_moe_offload.prefetch import MAX_TOKENS, Prefetch
from vllm_moe_offload.prefetch_control import PrefetchControl
from vllm_moe_offload.sizes import MIB, format_size
from vllm_moe_offload.transfer_time import row_seconds

Routers = Sequence[Router]


def check_foresight(
    config: MoeOffloadConfig, specs: Sequence[LayerSpec], routers: Routers | None
) -> None:
    """Refuse options that do not fit the layers.

    Raises:
        OffloadError: the predictor does not work for such layers, or less than one of their
            experts may be fetched.
    """
    if config.predictor == "none":
        return
    experts = {spec.num_experts for spec in specs}
    top_ks = {spec.routing and spec.routing.top_k for spec in specs}
    problem = None
    if len(specs) < 2:
        problem = "it guesses from one offloaded layer to the next, and there is only one"
    elif len(experts) > 1 or len(top_ks) > 1 or None in top_ks:
        problem = "the layers differ in how many experts they have or a token chooses"
    elif config.predictor == "gate" and routers is None:
        problem = "the routers of this model are not where they are looked for"
    if problem:
        remedy = "Give markov, eam or none" if routers is None and len(specs) > 1 else "Give none"
        raise OffloadError("predictor", config.predictor, problem, remedy)
    row_bytes = max(spec.layout.row_bytes for spec in specs)
    if config.prefetch_mb != "auto" and 0 < config.prefetch_mb * MIB < row_bytes:
        raise OffloadError(
            "prefetch_mb",
            config.prefetch_mb,
            f"one expert takes {format_size(row_bytes)}",
            "Give that or more, 0 to only count, or auto",
        )


def make_prefetch(
    config: MoeOffloadConfig,
    layers: Sequence[OffloadedLayer],
    routers: Routers | None,
    device: torch.device,
    spans_layers: Callable[[], bool],
    say: Callable[[str], None],
) -> Prefetch | None:
    """What the options ask for; None without a predictor.

    Args:
        config: the options, which ``check_foresight`` has accepted.
        layers: all layers, with nothing resident.
        routers: those of all layers, if they are known.
        device: where the layers are computed.
        spans_layers: see ``Prefetch``.
        say: takes a line for the log.
    """
    if config.predictor == "none":
        return None
    routing = layers[0].spec.routing
    assert routing is not None
    return Prefetch(
        layers,
        _predictor(config.predictor, layers, routers, device),
        device,
        _rows(config, layers, device, say),
        top_k=routing.top_k,
        spans_layers=spans_layers,
    )


def _predictor(
    name: str, layers: Sequence[OffloadedLayer], routers: Routers | None, device: torch.device
) -> Predictor:
    experts = layers[0].spec.num_experts
    if name == "gate":
        assert routers is not None
        return GatePredictor(routers, device)
    if name == "markov":
        return MarkovPredictor(len(layers), experts, device)
    return EamPredictor(len(layers), experts, MAX_TOKENS, device)


def _rows(
    config: MoeOffloadConfig,
    layers: Sequence[OffloadedLayer],
    device: torch.device,
    say: Callable[[str], None],
) -> int | PrefetchControl:
    if config.prefetch_mb != "auto":
        return int(config.prefetch_mb * MIB) // max(x.spec.layout.row_bytes for x in layers)
    some = [x for x in layers[1:] if 0 < x.residency.num_slots < x.spec.num_experts]
    loading = [layer for layer in some if not layer.is_held]
    if not loading:
        return 0  # Everything has a slot or nothing, or is on the GPU: guesses are only counted.
    largest = max(loading, key=lambda layer: layer.spec.layout.row_bytes)
    return PrefetchControl(len(layers), row_seconds(largest, device), say)
