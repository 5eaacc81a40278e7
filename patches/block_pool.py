"""vLLM's blocks, as the lender takes and returns them.

Target: ``BlockPool.get_new_blocks``, ``._maybe_evict_cached_block`` and ``.reset_prefix_cache`` in
    vllm.v1.core.block_pool; also reads its blocks and their queue, in vllm.v1.core.kv_cache_utils.
Versions: 0.32, 0.33.
Why: vLLM knows no blocks that are neither used nor free.
How: ``evict_blocks`` drops a free block's prefix-cache entries and says so to listeners, ``touch``
    unlinks it from the free queue with a reference that nobody else holds. ``free_blocks`` puts
    it back; a block without a hash goes to the front of the queue, in the order given.
    ``num_gpu_blocks`` becomes the number of blocks that vLLM has at the time: the pool itself
    reads it only in ``get_usage`` and ``reset_prefix_cache``, which so tell the truth. Start-up
    checks and the capacity in the logs read the configuration, which stays.
    ``_reuse_watchers`` of blocks that are still read after they were freed hear of the reuse.
    Free blocks are queued coldest first; prefix-cache hits leave the queue and join its end.
    The order is no more than a preference, and ids of old blocks are in no order at all, so
    ``get_new_blocks`` first brings the lowest of the coldest to the front.
    Every entry that leaves the prefix cache is heard of, to learn whether it is missed.
Can go: when vLLM can resize its pool.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from types import ModuleType
from typing import Any

from vllm_moe_offload.lending.boundary import NULL_BLOCKS
from vllm_moe_offload.lending.controller import Ghosts, Standing
from vllm_moe_offload.lending.lender import window
from vllm_moe_offload.patches.wrapping import wrap

_GHOSTS = "moe_offload_ghosts"

_SEEN = 8
"""Free blocks that are looked at for each that is taken: all of them may be a hundred thousand."""


def apply(module: ModuleType) -> None:
    """Let shared pools tell what they drop."""
    wrap(module.BlockPool, "get_new_blocks", _get_new_blocks)
    wrap(module.BlockPool, "_maybe_evict_cached_block", _maybe_evict_cached_block)
    wrap(module.BlockPool, "reset_prefix_cache", _reset_prefix_cache)


def _get_new_blocks(original: Callable[..., Any], self: Any, num_blocks: int) -> Any:
    if hasattr(self, _GHOSTS) and 0 < num_blocks <= self.get_num_free_blocks():
        queue = self.free_block_queue
        coldest = _first(self, window(num_blocks))
        chosen = heapq.nsmallest(num_blocks, coldest, key=lambda block: block.block_id)
        for block in chosen:
            queue.remove(block)
        queue.prepend_n(chosen)
    return original(self, num_blocks)


def _first(pool: Any, limit: int) -> Iterator[Any]:
    """The coldest free blocks, so many at most; the queue must not change meanwhile."""
    queue = pool.free_block_queue
    block = queue.fake_free_list_head.next_free_block
    for _ in range(limit):
        if block is queue.fake_free_list_tail:
            return
        yield block
        block = block.next_free_block


def _maybe_evict_cached_block(original: Callable[..., bool], self: Any, block: Any) -> bool:
    ghosts: Ghosts | None = getattr(self, _GHOSTS, None)
    if ghosts is not None and block.block_hash is not None:
        ghosts.dropped(block.block_hash)
    return original(self, block)


def _reset_prefix_cache(original: Callable[..., bool], self: Any) -> bool:
    done = original(self)
    ghosts: Ghosts | None = getattr(self, _GHOSTS, None)
    if ghosts is not None and done:
        ghosts.clear()
    return done


class VllmPool:
    """A block pool that shares its blocks.

    Args:
        pool: vLLM's.
        ghosts: hears of the prefix-cache entries that are dropped from now on.
    """

    def __init__(self, pool: Any, ghosts: Ghosts) -> None:
        self._pool = pool
        setattr(pool, _GHOSTS, ghosts)

    def free_among(self, ids: Sequence[int], limit: int) -> list[int]:
        """Up to ``limit`` of the ids that no request holds, the coldest of them first.

        Those that are not among the coldest of all come in the order given.
        """
        blocks = self._pool.blocks
        free = [id_ for id_ in ids if blocks[id_].ref_cnt == 0]
        if len(free) <= limit:
            return free
        wanted = set(free)
        coldest = (block.block_id for block in _first(self._pool, _SEEN * limit))
        found = list(islice((id_ for id_ in coldest if id_ in wanted), limit))
        others = wanted.difference(found)
        return found + [id_ for id_ in free if id_ in others][: limit - len(found)]

    def take(self, ids: Sequence[int]) -> None:
        """Withhold free blocks, and drop what the prefix cache has in them."""
        pool = self._pool
        blocks = [pool.blocks[id_] for id_ in ids]
        assert all(block.ref_cnt == 0 and not block.is_null for block in blocks)
        if pool._reuse_watchers:
            pool._notify_reuse(blocks)
        pool.evict_blocks(set(ids))
        pool.touch(blocks)
        pool.num_gpu_blocks -= len(blocks)

    def give(self, ids: Sequence[int]) -> None:
        """Put withheld blocks back, the lowest to be used first."""
        pool = self._pool
        pool.num_gpu_blocks += len(ids)
        pool.free_blocks([pool.blocks[id_] for id_ in ids])

    def standing(self, lent: int, run: Sequence[int]) -> Standing:
        """Count blocks; ``run`` are the ids in the way of the next increments."""
        pool = self._pool
        free = pool.get_num_free_blocks()
        in_run = [pool.blocks[id_] for id_ in run]
        return Standing(
            lent=lent,
            used_blocks=pool.num_gpu_blocks - NULL_BLOCKS - free,
            cached_blocks=min(free, len(pool.cached_block_hash_to_block)),
            cached_in_run=sum(b.ref_cnt == 0 and b.block_hash is not None for b in in_run),
        )
