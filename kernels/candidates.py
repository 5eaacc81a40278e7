"""What the adaptive policy chooses from, and what it may risk: plain figures, without imports.

All of them are exact in float32 or in integers, so that the simulator, the torch form and the
kernel of ``learn`` come to the same bits.
"""

import struct


def _float32(value: float) -> float:
    """Round to what 32 bits hold."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


HALF_LIVES = (4.0, 32.0, 512.0)
"""Steps after which a use counts half, of the averages kept for every expert."""

FADES = tuple(_float32(0.5 ** (1 / half_life)) for half_life in HALF_LIVES)
"""What a step leaves of each average."""

GAINS = tuple(_float32(1 - fade) for fade in FADES)
"""What a use adds to each average, which so stays between 0 and 1."""

FAINT = 2.0**-100
"""Least average of an expert that was ever used: above the numbers that some processors flush."""

MIXTURES = (
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (0, 1 / 2, 1 / 2),
    (1 / 8, 1 / 8, 1 / 2),
)
"""Candidate orders beside LRU: weights of the averages. They add up to 1 at most, and are powers
of two: then a product is exact, and a fused multiply-add rounds as the two operations do."""

LRU = 0
"""The candidate that ranks by recency; the mixtures come after it."""

SEQUEL = 1 + len(MIXTURES)
"""The candidate that ranks by what has been used soon after the experts of this step."""

CANDIDATES = 1 + SEQUEL

AS_LRU = CANDIDATES
"""The order after the candidates': what LRU's cache does not hold goes first, oldest first."""

OPENING_LEADER = 4
"""Who is followed at the start: half of the mid-term average and half of the long one."""

SOON = (2, 3, 4)
"""Steps after a use in which the uses of others count as its sequel. An order that a step leaves
decides in the next one who goes, so it matters from the one after that."""

SEQUEL_UNIT = 1 << 12
"""What a use in one of these steps counts; all of them together fit 16 bits."""

SEQUEL_SHIFT = 7
"""An observation moves what is known of a sequel by 1 / 2 ** 7 of the difference."""

SEQUEL_MIXTURE = MIXTURES[-1]
"""Added to each expert's part in the sequels, in ``SEQUEL_UNIT``, for each expert of the step."""

SEQUEL_SCALE = 2.0**-24
"""Makes the sum over all experts, which is exact in float32, one between 0 and 1."""

VOTE_FADE = _float32(0.5 ** (1 / 200.0))
"""What a step leaves of the votes for a candidate: half after 200 steps."""

SWITCH_MARGIN = 0.25
"""Votes a layer by which another candidate must be ahead to be followed."""

HIT = 10_000
"""The balance against LRU is kept in ten-thousandths of a hit."""

LOSS_RATE = 14
"""Part of a hit that may be lost to LRU with every access."""

OPENING_CREDIT = 1000
"""Part of a hit, for each layer, that may be lost to LRU at the start."""

DEVIATION_PRICE = 8000
"""Part of a hit that an expert is expected to cost which LRU would hold and the cache does not."""

STRIDE = 101
"""Layers by which the turn to deviate moves from step to step: a prime, so that all get theirs."""

EXPERT_BITS = 10
"""Lowest bits of a rank: they hold the expert, so that no two of a layer rank the same."""

MAX_AGE = (1 << 20) - 2
"""Steps since the last use are counted up to here; beside the expert they fit below ``FIRST``."""

FIRST = 1 << 30
"""Added to a rank it puts an expert before all without it."""

LOWER_FIRST = FIRST - 1
"""An expert's id, every bit of which is turned by this, ranks the lower the higher the id is."""
