"""What a step ran: which rows of its log belong to which sequence.

Legend: R sequences of a step, T tokens, L layers, K choices a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one step, sequence after sequence in the order of the batch.

    Sequences are numbered, each number is used once. ``begun`` and ``ended`` take effect before
    the step's tokens.

    Args:
        sequences_R: the number of each sequence.
        starts_R: position in its sequence of each one's first token; not looked at if the
            positions of all tokens are recorded beside the ids.
        counts_R: tokens of each.
        drafts_R: how many of them, the last ones, are drafts that may turn out wrong; None for
            none at all.
        begun: sequences that are new, each with the length of its prompt.
        ended: sequences that are over.
    """

    sequences_R: Sequence[int] = ()
    starts_R: Sequence[int] | NDArray[np.integer] = ()
    counts_R: Sequence[int] = ()
    drafts_R: Sequence[int] | None = None
    begun: tuple[tuple[int, int], ...] = ()
    ended: tuple[int, ...] = ()

    def without_tokens(self) -> "StepRows":
        """Keep only what began and ended."""
        return replace(self, sequences_R=(), starts_R=(), counts_R=(), drafts_R=None)


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A step's rows with what its log held.

    Args:
        rows: whose tokens they are.
        ids_TLK: int16, the routed ids; None if the step had no tokens or was dropped.
        positions_T: positions of the tokens where the host did not know them.
    """

    rows: StepRows
    ids_TLK: NDArray[np.int16] | None = None
    positions_T: NDArray[np.integer] | None = None
