"""Which experts the benchmarks' tokens are routed to, instead of a router without weights.

vLLM asks a registered strategy in every MoE layer. What a strategy decides, it decides on the
device, so that a CUDA graph that was captured with one routing replays with others.

Legend: T tokens, K choices a token, E experts, L MoE layers, N tokens of a trace.
"""

from typing import Any

import torch
from torch import Tensor

STRATEGY = "benchmark"
"""The name in ``VLLM_MOE_ROUTING_SIMULATION_STRATEGY``."""


def register(strategy: Any) -> None:
    """Make a strategy the one that every layer asks."""
    from vllm.model_executor.layers.fused_moe.router import routing_simulator_router as simulator

    # vLLM asks more of a strategy in each version; its base class has the answers.
    kind = type(strategy)
    strategy.__class__ = type(kind.__name__, (kind, simulator.RoutingStrategy), {})
    simulator.RoutingSimulator.register_strategy(STRATEGY, strategy)


class UniformOverSome:
    """Uniform without replacement over the first experts, drawn anew in every step."""

    def __init__(self) -> None:
        self._limit: Tensor | None = None

    def confine(self, limit: int | None) -> None:
        """Route to the first ``limit`` experts only, None for all."""
        assert self._limit is not None, "nothing has been routed yet"
        self._limit.fill_(torch.iinfo(torch.int64).max if limit is None else limit)

    def route_tokens(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        top_k: int,
        indices_type: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights float32 and ids [T, K]."""
        (tokens, experts), device = router_logits.shape, router_logits.device
        if self._limit is None:
            self._limit = _constant(torch.iinfo(torch.int64).max, device)
        scores = torch.rand(tokens, experts, device=device)
        excluded = torch.arange(experts, device=device) >= self._limit
        ids_TK = scores.masked_fill(excluded, -1.0).topk(top_k, dim=-1).indices
        return _equal_weights(ids_TK), ids_TK.to(indices_type or torch.int32)


class Skewed:
    """Expert ``e`` of a layer with a probability that falls with ``(1 + e) ** -exponent``.

    Without replacement, drawn anew in every step: the largest of the logarithms plus noise after
    Gumbel.

    Args:
        exponent: 0 for uniform routing.
    """

    def __init__(self, exponent: float = 0.8) -> None:
        self._exponent = exponent

    def route_tokens(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        top_k: int,
        indices_type: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights float32 and ids [T, K]."""
        (tokens, experts), device = router_logits.shape, router_logits.device
        noise = -torch.log(-torch.log(torch.rand(tokens, experts, device=device)))
        rank = torch.arange(1, experts + 1, device=device, dtype=torch.float32)
        scores = noise - self._exponent * rank.log()
        ids_TK = scores.topk(top_k, dim=-1).indices
        return _equal_weights(ids_TK), ids_TK.to(indices_type or torch.int32)


class TraceReplay:
    """The ids of a trace, one token of it for every token that the model runs.

    The position in the trace is a tensor on the device, advanced by the last layer of every
    step, so that the replay of a graph goes on where the last one stopped.

    Args:
        ids_NLK: expert ids of the trace.
        spread: whether each sequence of a batch follows a stretch of its own; else a step takes
            tokens that follow each other.
    """

    def __init__(self, ids_NLK: Tensor, *, spread: bool = False) -> None:
        self._spread = spread
        self._ids_LNK = ids_NLK.transpose(0, 1).contiguous()
        self._trace_LNK = self._ids_LNK.clone()
        self._position: Tensor | None = None
        self._step_tokens = 0
        self._layer = 0

    def rewind(self, place: int = 0) -> None:
        """Let the next step begin with this token of the trace, and of each sequence's stretch."""
        if self._position is not None:
            self._position.fill_(place)

    def scramble(self, seed: int | None) -> None:
        """Replace the trace by uniform routing of as many tokens, the same for a seed; or restore.

        Args:
            seed: None for the trace itself.
        """
        ids_LNK = self._trace_LNK
        if seed is not None:
            drawn = torch.Generator().manual_seed(seed)
            layers, tokens, choices = ids_LNK.shape
            experts = int(ids_LNK.max()) + 1
            ids_LNK = torch.rand(layers, tokens, experts, generator=drawn).topk(choices).indices
        if self._position is None:
            self._ids_LNK = ids_LNK.to(self._ids_LNK.dtype, copy=True)
        else:
            self._ids_LNK.copy_(ids_LNK)  # A captured graph reads from here.

    @property
    def position(self) -> int:
        """Tokens that were routed since the start; waits for the device."""
        assert self._position is not None, "nothing has been routed yet"
        return int(self._position)

    def route_tokens(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        top_k: int,
        indices_type: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weights float32 and ids [T, K]."""
        (layers, length, choices), device = self._ids_LNK.shape, router_logits.device
        tokens = router_logits.shape[0]
        assert top_k == choices, f"the trace has {choices} experts a token, the model {top_k}"
        if self._position is None:
            self._position = _constant(0, device)
            with torch.inference_mode(False):
                self._ids_LNK = self._ids_LNK.to(device, indices_type or torch.int32)
        # Every step asks for all layers in order, also while a graph is captured.
        stride = max(1, length // tokens) if self._spread else 1
        place = (self._position + stride * torch.arange(tokens, device=device)) % length
        ids_TK = self._ids_LNK[self._layer].index_select(0, place)
        self._layer += 1
        if self._layer == layers:
            self._layer = 0
            self._position += 1 if self._spread else tokens
        return _equal_weights(ids_TK), ids_TK


def _constant(value: int, device: torch.device) -> Tensor:
    """A number on the device that may be changed in place inside and outside of inference."""
    with torch.inference_mode(False):
        return torch.tensor(value, device=device)


def _equal_weights(ids_TK: Tensor) -> Tensor:
    return torch.full(ids_TK.shape, 1 / ids_TK.shape[1], device=ids_TK.device)
