"""Ghost caches: what each layer would hold if it always evicted by one order.

Legend: C cache sizes, M orders, R = M + 1 caches a size, L layers, E experts, A pairs of a layer
and an expert.
"""

import numpy as np

from vllm_moe_offload.kernels.candidates import FIRST, LRU
from vllm_moe_offload.simulate.cache import Bools, Ints, admit
from vllm_moe_offload.simulate.orders import Ranks
from vllm_moe_offload.simulate.steps import Step

OWN = -1
"""The last cache of each size is no ghost but the real one."""


class GhostCaches:
    """One cache for each size and order, and the real one beside them, by ``cache.admit``.

    Args:
        num_orders: M.
        num_layers: L.
        num_experts: E.
        slots_C: slots of a layer for each cache size.
    """

    def __init__(self, num_orders: int, num_layers: int, num_experts: int, slots_C: Ints) -> None:
        shape = (slots_C.size, num_orders + 1, num_layers, num_experts)
        self._slots_C11, self._fewest_slots = slots_C[:, None, None], slots_C.min()
        self._held_CRLE = np.zeros(shape, dtype=bool)
        self._num_held_CRL = np.zeros(shape[:-1], dtype=np.int64)
        self._key_CRLE = np.zeros(shape, dtype=np.int32)
        self._start_CRL = np.arange(0, self._key_CRLE.size, num_experts).reshape(shape[:-1])

    def held(self, order: int) -> Bools:
        """Who is held by the caches of one order, or the real ones, [C, L, E]."""
        return self._held_CRLE[:, order]

    def put(self, resident_CLE: Bools) -> None:
        """Make the real caches hold other experts."""
        self._held_CRLE[:, OWN] = resident_CLE
        self._num_held_CRL[:, OWN] = resident_CLE.sum(-1)

    def adopt(self) -> None:
        """Make every ghost that has empty slots hold what the real cache holds.

        No slot opens or closes here, so the real cache is full if a ghost is.
        """
        size, order, layer = np.nonzero(self._num_held_CRL < self._slots_C11)
        for array in (self._held_CRLE, self._num_held_CRL):
            array[size, order, layer] = array[size, OWN, layer]

    def hits(self, step: Step) -> Ints:
        """Count the experts held among those that each layer reads, [C, R, L]."""
        sizes, caches = self._held_CRLE.shape[:2]
        found_CRA = self._held_CRLE.reshape(sizes, caches, -1).take(step.pair_A, axis=-1)
        reads_L = step.block.reads_SL[step.place]
        hits: Ints = np.add.reduceat(
            found_CRA.view(np.int8), reads_L.cumsum() - reads_L, axis=-1, dtype=np.int16
        )
        return hits

    def admit(
        self, step: Step, rank_MLE: Ranks, own_CLE: Ranks, by_id_CL: Bools, hits_CRL: Ints
    ) -> None:
        """Give what a step reads slots: each order's of its lowest ranks.

        Args:
            step: what is read.
            rank_MLE: ranks below 0 of the orders.
            own_CLE: ranks below 0 by which the real caches evict.
            by_id_CL: where ids decide who of too many missing experts gets one of their slots.
            hits_CRL: as ``hits`` counts them.
        """
        held_CRLE, reads_L = self._held_CRLE, step.block.reads_SL[step.place]
        if reads_L.max() > self._fewest_slots:
            self._admit_some(step, rank_MLE, own_CLE, by_id_CL)
            return
        # Who is not to be evicted has the key 0, above all ranks.
        evictable_CRLE, key_CRLE = held_CRLE & ~step.active_LE, self._key_CRLE
        np.multiply(evictable_CRLE[:, :OWN], rank_MLE, out=key_CRLE[:, :OWN])
        np.multiply(evictable_CRLE[:, OWN], own_CLE, out=key_CRLE[:, OWN])
        wanted_CRL = self._num_held_CRL + reads_L - hits_CRL
        self._num_held_CRL = np.minimum(wanted_CRL, self._slots_C11)
        lowest_kept_CRL = self._start_CRL + (wanted_CRL - self._num_held_CRL)
        limit_CRL = np.sort(key_CRLE, axis=-1).reshape(-1).take(lowest_kept_CRL)
        held_CRLE &= key_CRLE >= limit_CRL[..., None]
        held_CRLE |= step.active_LE

    def _admit_some(self, step: Step, rank_MLE: Ranks, own_CLE: Ranks, by_id_CL: Bools) -> None:
        """Do the same where a layer may read more experts than it has slots."""
        sizes, caches, *shape = self._held_CRLE.shape
        self._key_CRLE[:, :OWN], self._key_CRLE[:, OWN] = rank_MLE, own_CLE
        slots = np.repeat(self._slots_C11.reshape(-1), caches)
        held = self._held_CRLE.reshape(-1, *shape)
        entry_CRLE = self._entry(by_id_CL)
        key, entry = (keys.reshape(held.shape) for keys in (self._key_CRLE, entry_CRLE))
        held = admit(held, step.active_LE, key, slots, entry_LE=entry)
        self._held_CRLE = held.reshape(sizes, caches, *shape)
        self._num_held_CRL = self._held_CRLE.sum(-1)

    def _entry(self, by_id_CL: Bools) -> Ranks:
        """Ranks by which missing experts compete, as ``kernels.resolve.entry_rank`` has them."""
        entry_CRLE = self._key_CRLE.copy()
        by_id_E = -np.arange(entry_CRLE.shape[-1], dtype=np.int32)
        entry_CRLE[:, LRU] = by_id_E
        own_CLE = entry_CRLE[:, OWN]
        # Ranks that put an expert behind all others are below those of the orders.
        by_id_CLE = by_id_E + np.int32(by_id_E.size) * (own_CLE >= -FIRST)
        own_CLE[:] = np.where(by_id_CL[..., None], by_id_CLE, own_CLE)
        return entry_CRLE
