"""Activation functions between the two matrix products of an expert.

The names and the mathematics are those of vLLM's ``MoEActivation``, so that a layer's
configuration can be passed on as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An activation and its constants; None where a constant does not apply.

    ``limit`` clamps gate and up before they meet (SwiGLU variants), ``alpha`` scales the gate
    inside the sigmoid, ``beta`` is added to up. ``situ_beta`` and ``situ_linear_beta`` belong
    to SituGLU alone.
    """

    name: str
    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    situ_beta: float | None = None
    situ_linear_beta: float | None = None

    @property
    def is_gated(self) -> bool:
        """Whether the first product holds gate and up, twice the intermediate size."""
        return not self.name.endswith("_no_mul")


def activate_torch(h: Tensor, activation: Activation) -> Tensor:
    """Apply an activation along the last dimension, in float32, rounded once at the end.

    Args:
        h: [..., 2 I] for gated activations, [..., I] for plain ones.
        activation: one of ``SUPPORTED``.

    Returns:
        [..., I] of the same type.
    """
    return _FUNCTIONS[activation.name](h.float(), activation).to(h.dtype)


def _halves(h: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    gate, up = h.chunk(2, dim=-1)
    return _clamp(gate, up, limit)


def _clamp(gate: Tensor, up: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    if limit is None:
        return gate, up
    return gate.clamp(max=limit), up.clamp(-limit, limit)


def _silu(h: Tensor, a: Activation) -> Tensor:
    gate, up = _halves(h, a.limit)
    return F.silu(gate) * up


def _gelu(h: Tensor, _: Activation) -> Tensor:
    gate, up = _halves(h, None)
    return F.gelu(gate) * up


def _gelu_tanh(h: Tensor, _: Activation) -> Tensor:
    gate, up = _halves(h, None)
    return F.gelu(gate, approximate="tanh") * up


def _swiglu_oai(gate: Tensor, up: Tensor, alpha: float, beta: float) -> Tensor:
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _swigluoai(h: Tensor, _: Activation) -> Tensor:
    # gpt-oss interleaves gate and up, and its constants are part of the architecture.
    gate, up = _clamp(h[..., ::2], h[..., 1::2], 7.0)
    return _swiglu_oai(gate, up, alpha=1.702, beta=1.0)


def _swigluoai_uninterleave(h: Tensor, a: Activation) -> Tensor:
    gate, up = _halves(h, a.limit)
    return _swiglu_oai(gate, up, a.alpha, a.beta)


def _swiglustep(h: Tensor, a: Activation) -> Tensor:
    limit = 7.0 if a.limit is None else a.limit
    gate, up = _halves(h, None)
    return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)


def _situ(h: Tensor, a: Activation) -> Tensor:
    beta = 1.0 if a.situ_beta is None else a.situ_beta
    gate, up = _halves(h, None)
    if a.situ_linear_beta is not None:
        up = a.situ_linear_beta * torch.tanh(up / a.situ_linear_beta)
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up


_FUNCTIONS: dict[str, Callable[[Tensor, Activation], Tensor]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "swigluoai": _swigluoai,
    "swigluoai_uninterleave": _swigluoai_uninterleave,
    "swiglustep": _swiglustep,
    "situ": _situ,
    "silu_no_mul": lambda h, _: F.silu(h),
    "gelu_no_mul": lambda h, _: F.gelu(h),
    "gelu_tanh_no_mul": lambda h, _: F.gelu(h, approximate="tanh"),
    "relu2_no_mul": lambda h, _: F.relu(h).square(),
}

SUPPORTED = frozenset(_FUNCTIONS)
