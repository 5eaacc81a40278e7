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
    if GATED:
        pairs: tl.constexpr = (h_MN.shape[0], h_MN.shape[1] // 2, 2)
        gate, up = tl.split(tl.reshape(h_MN, pairs))
        if NAME == "silu":
            y = _silu(_at_most(gate, LIMIT)) * _within(up, LIMIT)
        elif NAME == "gelu":
            y = _gelu(gate) * up
        elif NAME == "gelu_tanh":
            y = _gelu_tanh(gate) * up
        elif NAME == "swigluoai":
            y = _swiglu_oai(gate, up, 7.0, 1.702, 1.0)
        elif NAME == "swigluoai_uninterleave":
            y = _swiglu_oai(gate, up, LIMIT, ALPHA, BETA)
        elif NAME == "swiglustep":
            y = _swiglu_step(gate, up, 7.0 if LIMIT is None else LIMIT)
        elif NAME == "situ":
            y = _situ(gate, up, SITU_BETA, SITU_LINEAR_BETA)
    elif NAME == "silu_no_mul":
        y = _silu(h_MN)
    elif NAME == "gelu_no_mul":
        y = _gelu(h_MN)
    elif NAME == "gelu_tanh_no_mul":
        y = _gelu_tanh(h_MN)
    elif NAME == "relu2_no_mul":
        y = _relu(h_MN) * _relu(h_MN)
    return y


@triton.jit
def _at_most(x, limit: tl.constexpr):
    if limit is not None:
        x = tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _within(x, limit: tl.constexpr):
    if limit is not None:
        x = tl.maximum(_at_most(x, limit), -limit, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


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
def _swiglu_oai(gate, up, limit: tl.constexpr, alpha: tl.constexpr, beta: tl.constexpr):
    gate, up = _at_most(gate, limit), _within(up, limit)
    return gate * tl.sigmoid(alpha * gate) * (up + beta)


@triton.jit
def _swiglu_step(gate, up, limit: tl.constexpr):
    return _at_most(_silu(gate), limit) * _within(up, limit)


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
