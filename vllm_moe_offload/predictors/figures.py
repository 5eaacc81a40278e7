"""What the predictors are tuned to: plain figures, shared by the engine and the simulator."""

from vllm_moe_offload.kernels.fixed_point import RECENT_STEPS

SMOOTHING = 20.0
"""Uses of an expert after which its own transitions weigh as much as the prior."""

LIFETIME_WEIGHT = 0.3
RECENT_WEIGHT = 1.5
"""Weights of the logarithms of the two priors."""

RECENT_FADE = 1 - 1 / RECENT_STEPS
"""What a step leaves of an expert's recent share."""

RECENT_FLOOR = 0.02
"""Added to an expert's recent share of the steps."""

LEAST_PRIOR = 1e-4
"""An expert that was never used might be."""

REFRESH = 64
"""Steps after which counts reach the table that predictions are read from."""

MOST_TOKENS = 1 << 30
"""Tokens that are counted before all counts are halved, so that they fit 31 bits."""

CAPACITY = 256
"""Activation matrices kept by default; MoE-Infinity's authors find that hundreds suffice."""

WINDOW = 64
"""Tokens after which a sequence's activation matrix is complete, so that long sequences do not
blur."""
