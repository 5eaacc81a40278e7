"""Predictions in integers: plain figures, shared by the torch forms and the kernels."""

FRACTION_BITS = 8
"""Of a logarithm to base 2: a factor of 1.003 is told apart."""

ONE_BITS = 12
ONE = 1 << ONE_BITS
"""Demand for an expert that a token is sure to ask for."""

ROUNDS = 3
"""Times that what the surest experts cannot take is shared out among the others."""

FULL_WEIGHT_BITS = 20
"""Weight of a token's likeliest expert; with 1024 experts the sum still fits 31 bits."""

HALF_SHIFT = FULL_WEIGHT_BITS - ONE_BITS + 1
"""From a weight to half of a demand."""

LARGEST_SHIFT = 31
"""What is that many binary orders less likely is impossible."""

LIMIT = float(1 << 20)
"""Router logits are cut off here, in ``1 / 2 ** FRACTION_BITS``."""

RECENT_BITS = 15
"""An expert's recent use is counted in ``1 / 2 ** RECENT_BITS``."""

RECENT_STEPS = 10
"""Steps over which use counts as recent: each takes a tenth off what was before it."""

RECENT_GAIN = (1 << RECENT_BITS) // RECENT_STEPS
RECENT_FADE = (1 << RECENT_BITS) - RECENT_GAIN

RECENT_CHOICE_BITS = 10
"""Bits of a recent use that choose from the table of its logarithms."""

LEAST_DEMAND = ONE // 8
"""What is less likely than this is not fetched ahead, whatever room there is."""

MOST_DEMAND = 1 << 16
"""More than so much makes no difference; beside the expert it fits 31 bits."""

EXPERT_BITS = 10
"""Of an expert's number."""
