# mypy: ignore-errors
"""The activations of ``activation.SUPPORTED`` on a tile in registers, in float32.

Legend: M rows and N columns of a tile; a gated tile holds gate and up in alternate columns.
"""

import triton
import triton.language as tl


@triton.jit
def activate(
    h_MN, NAME: tl.constexpr, GATED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, SITU_BETA: tl.constexpr, SITU_LINEAR_BETA: tl.constexpr,
):  # fmt: skip
    """Apply the activation; half the columns come back if it is gated."""
    if not GATED:
        return _plain(h_MN, NAME)
    pairs: tl.constexpr = (h_MN.shape[0], h_MN.shape[1] // 2, 2)
    gate, up = tl.split(tl.reshape(h_MN, pairs))
    if NAME == "swigluoai":
        return _swiglu_oai(_at_most(gate, 7.0), _within(up, 7.0), 1.702, 1.0)
    if NAME == "swiglustep":
        return _at_most(_silu(gate), LIMIT or 7.0) * _within(up, LIMIT or 7.0)
    if NAME == "situ":
        return _situ(gate, up, SITU_BETA, SITU_LINEAR_BETA)
    if NAME == "gelu":
        return _gelu(gate) * up
    if NAME == "gelu_tanh":
        return _gelu_tanh(gate) * up
    if LIMIT is not None:
        gate, up = _at_most(gate, LIMIT), _within(up, LIMIT)
    if NAME == "silu":
        return _silu(gate) * up
    tl.static_assert(NAME == "swigluoai_uninterleave")
    return _swiglu_oai(gate, up, ALPHA, BETA)


@triton.jit
def _plain(h, NAME: tl.constexpr):
    if NAME == "silu_no_mul":
        return _silu(h)
    if NAME == "gelu_no_mul":
        return _gelu(h)
    if NAME == "gelu_tanh_no_mul":
        return _gelu_tanh(h)
    tl.static_assert(NAME == "relu2_no_mul")
    positive = tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive


@triton.jit
def _at_most(x, limit: tl.constexpr):
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _within(x, limit: tl.constexpr):
    return tl.maximum(_at_most(x, limit), -limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _gelu_tanh(x):
    # (1 + tanh(u)) / 2 is sigmoid(2 u), which loses nothing for very negative u.
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _swiglu_oai(gate, up, alpha: tl.constexpr, beta: tl.constexpr):
    return gate * tl.sigmoid(alpha * gate) * (up + beta)


@triton.jit
def _tanh(x):
    # Near zero the quotient below cancels, so the series takes over before that shows.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    decay = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.0625, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _situ(gate, up, BETA: tl.constexpr, LINEAR_BETA: tl.constexpr):
    if LINEAR_BETA is not None:
        up = LINEAR_BETA * _tanh(up / LINEAR_BETA)
    beta: tl.constexpr = 1.0 if BETA is None else BETA
    return beta * _tanh(gate / beta) * tl.sigmoid(gate) * up
