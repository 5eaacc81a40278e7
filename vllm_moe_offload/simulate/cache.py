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
        score_LE: the higher, the longer an expert stays; [L, E] or [C, L, E]. Integers are ranks,
            of which no two of a layer may be equal; they are looked through at once.
        slots_C: slots of a layer for each cache size.
        bypass: let active experts compete by their score too, so that some may pass through
            although a resident could be evicted.
    """
    if bypass:
        wanted = resident_CLE | active_LE
        return _without_lowest(wanted, wanted, score_LE, wanted.sum(-1) - slots_C[:, None])
    hit = resident_CLE & active_LE
    missing, evictable = active_LE & ~hit, resident_CLE & ~hit
    num_resident, num_hit = resident_CLE.sum(-1), hit.sum(-1)
    num_evictable = num_resident - num_hit
    needed = active_LE.sum(-1) - num_hit - (slots_C[:, None] - num_resident)
    if (needed > num_evictable).any():
        room = slots_C[:, None] - num_hit
        missing &= missing.cumsum(-1) <= room[..., None]
    victims = np.minimum(needed, num_evictable)
    return _without_lowest(resident_CLE | missing, evictable, score_LE, victims)


def _without_lowest(members: Bools, evictable: Bools, score_LE: Scores, count_CL: Ints) -> Bools:
    """Take out of each layer the ``count_CL`` evictable experts of the lowest scores."""
    if score_LE.dtype.kind == "i":
        return _without_lowest_ranks(members, evictable, score_LE, count_CL)
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


def _without_lowest_ranks(
    members: Bools, evictable: Bools, rank_LE: NDArray[Any], count_CL: Ints
) -> Bools:
    # Ranks below 0, so that the product is above them all where nobody is to be evicted.
    key_CLE = evictable * (rank_LE - (rank_LE.max() + 1))
    num_experts = key_CLE.shape[-1]
    ascending = np.sort(key_CLE, axis=-1).reshape(-1)
    lowest_kept_CL = np.arange(0, ascending.size, num_experts).reshape(count_CL.shape)
    lowest_kept_CL += np.maximum(count_CL, 0)
    limit_CL = ascending.take(lowest_kept_CL, mode="clip")
    limit_CL[count_CL == num_experts] = 0
    return members & (key_CLE >= limit_CL[..., None])
