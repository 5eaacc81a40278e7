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
    resident_CLE: Bools,
    active_LE: Bools,
    score_LE: Scores,
    slots_C: Ints,
    *,
    entry_LE: Scores | None = None,
    bypass: bool = False,
) -> Bools:
    """Give the active experts slots, and return who is resident afterwards.

    As ``kernels.resolve`` does: no active expert is a victim; the missing ones first take the
    empty slots, then those of the residents with the lowest score (the lower id first among
    equals). If there are more missing experts than such slots, the ones with the highest entry
    scores get them (the higher id among equals) and the others pass through without a slot.

    Args:
        resident_CLE: before the step, never more than the layer has slots.
        active_LE: experts that the step reads.
        score_LE: the higher, the longer an expert stays; [L, E] or [C, L, E].
        slots_C: slots of a layer for each cache size.
        entry_LE: the higher, the sooner a missing expert gets a slot; None to go by the score.
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
        entry_LE = score_LE if entry_LE is None else entry_LE
        missing = _without_lowest(missing, missing, entry_LE, missing.sum(-1) - room)
    victims = np.minimum(needed, num_evictable)
    return _without_lowest(resident_CLE | missing, evictable, score_LE, victims)


def _without_lowest(members: Bools, evictable: Bools, score_LE: Scores, count_CL: Ints) -> Bools:
    """Take out of each layer the ``count_CL`` evictable experts of the lowest scores."""
    key_CLE, num_experts = _keys(evictable, score_LE), members.shape[-1]
    ascending = np.sort(key_CLE, axis=-1).reshape(-1)
    count_CL1 = np.maximum(count_CL, 0)[..., None]
    lowest_kept_CL1 = np.arange(0, ascending.size, num_experts).reshape(count_CL1.shape) + count_CL1
    limit_CL1 = ascending.take(lowest_kept_CL1, mode="clip")
    limit_CL1[count_CL1 == num_experts] = _top(key_CLE)
    evicted_CLE = key_CLE < limit_CL1
    if np.count_nonzero(evicted_CLE) < count_CL1.sum():
        equal_CLE = evictable & (key_CLE == limit_CL1)
        left_CL1 = count_CL1 - evicted_CLE.sum(-1, keepdims=True)
        evicted_CLE |= equal_CLE & (equal_CLE.cumsum(-1) <= left_CL1)
    return members & ~evicted_CLE


def _keys(evictable: Bools, score_LE: Scores) -> NDArray[Any]:
    """The scores, but ``_top`` for who is not to be evicted."""
    if score_LE.dtype.kind != "i":
        return np.where(evictable, score_LE, np.inf)
    # A product is quicker; below 0 all integers are below those that it makes 0.
    keys: NDArray[Any] = evictable * (score_LE - (score_LE.max() + 1))
    return keys


def _top(keys: NDArray[Any]) -> float:
    """Above all that may be evicted."""
    return 0 if keys.dtype.kind == "i" else np.inf
