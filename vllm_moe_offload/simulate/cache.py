"""Which experts are resident after a step: the one rule of replacement, for every policy.

Legend: C cache sizes, L layers, E experts. All cache sizes are replayed side by side.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]
Scores = NDArray[np.floating[Any] | np.integer[Any]]


def admit(
    resident_CLE: Bools, active_LE: Bools, score_LE: Scores, slots_C: Ints, *, bypass: bool = False
) -> Bools:
    """Give the active experts slots, and return who is resident afterwards.

    As ``kernels.resolve`` does: no active expert is a victim; the missing ones first take the
    empty slots, then those of the residents with the lowest score (the lower id first among
    equals). If there are more missing experts than such slots, the ones with the lower ids
    get them and the others pass through without a slot.

    Args:
        resident_CLE: before the step, never more than the layer has slots.
        active_LE: experts that the step reads.
        score_LE: the higher, the longer an expert stays; [L, E] or [C, L, E].
        slots_C: slots of a layer for each cache size.
        bypass: let active experts compete by their score too, so that some may pass through
            although a resident could be evicted.
    """
    if bypass:
        wanted = resident_CLE | active_LE
        return _without_lowest(wanted, wanted, score_LE, wanted.sum(-1) - slots_C[:, None])
    missing = active_LE & ~resident_CLE
    evictable = resident_CLE & ~active_LE
    num_missing = missing.sum(-1)
    needed = num_missing - (slots_C[:, None] - resident_CLE.sum(-1))
    num_evictable = evictable.sum(-1)
    if (needed > num_evictable).any():
        room = num_missing - np.maximum(needed - num_evictable, 0)
        missing &= missing.cumsum(-1) <= room[..., None]
    victims = np.minimum(needed, num_evictable)
    return _without_lowest(resident_CLE | missing, evictable, score_LE, victims)


def _without_lowest(members: Bools, evictable: Bools, score_LE: Scores, count_CL: Ints) -> Bools:
    """Take out of each layer the ``count_CL`` evictable experts of the lowest scores."""
    num_experts = members.shape[-1]
    kept = members.reshape(-1, num_experts)
    key = np.where(evictable, score_LE, np.inf).reshape(-1, num_experts)
    count = count_CL.reshape(-1)
    rows = np.flatnonzero(count > 0)
    taken = 0
    while rows.size:
        victim = key[rows].argmin(-1)
        kept[rows, victim] = False
        key[rows, victim] = np.inf
        taken += 1
        rows = rows[count[rows] > taken]
    return kept.reshape(members.shape)
