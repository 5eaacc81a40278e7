"""vLLM's block pool, as the lender takes blocks out of it and puts them back."""

import random

import pytest
from vllm.v1.core.block_pool import BlockPool

from vllm_moe_offload import plugin
from vllm_moe_offload.lending import lender
from vllm_moe_offload.lending.controller import Ghosts
from vllm_moe_offload.patches import block_pool
from vllm_moe_offload.patches.block_pool import VllmPool

plugin.register()


@pytest.fixture
def pool():
    return BlockPool(num_gpu_blocks=20, enable_caching=True, hash_block_size=4)


def cached(pool: BlockPool, order: list[int]) -> None:
    """Make every block one of the prefix cache, and free them in this order."""
    blocks = pool.get_new_blocks(len(order))
    by_id = {block.block_id: block for block in blocks}
    for block in blocks:
        pool._insert_block_hash(block.block_id.to_bytes(8, "big"), block, num_tokens=4)
    pool.free_blocks([by_id[id_] for id_ in order])


def test_cached_blocks_are_taken_coldest_first(pool):
    order = random.Random(5).sample(range(1, 20), 19)
    cached(pool, order)
    ghosts = Ghosts(50)
    shared = VllmPool(pool, ghosts)
    ids = range(8, 20)
    coldest = [id_ for id_ in order if id_ in ids]
    assert shared.free_among(ids, 5) == coldest[:5]
    assert sorted(shared.free_among(ids, 12)) == list(ids)
    shared.take(coldest[:5])
    standing = shared.standing(2, range(8, 20))
    assert (standing.used_blocks, standing.cached_blocks, standing.cached_in_run) == (0, 14, 7)
    keys = [id_.to_bytes(8, "big") for id_ in coldest[:5]]
    assert ghosts.wanted(keys) == (5, 5)
    assert ghosts.wanted(keys) == (0, 0)
    assert pool.get_cached_block(b"", [0]) is None


def test_not_all_free_blocks_are_looked_at(pool, monkeypatch):
    """A large pool has a hundred thousand; which of the warmer ones go matters less."""
    cached(pool, [*range(19, 4, -1), *range(1, 5)])
    shared = VllmPool(pool, Ghosts(50))
    monkeypatch.setattr(block_pool, "_SEEN", 2)
    # Of these, the coldest six of all hold 15 and 14.
    assert shared.free_among([1, 2, 3, 14, 15], 3) == [15, 14, 1]
    monkeypatch.setattr(block_pool, "_SEEN", 1)
    assert shared.free_among([1, 2, 3, 14, 15], 3) == [1, 2, 3]


def test_blocks_come_back_in_front_and_the_lowest_first(pool):
    shared = VllmPool(pool, Ghosts(5))
    shared.take([19, 12, 15])
    assert pool.num_gpu_blocks == 17
    shared.give([12, 15, 19])
    assert pool.num_gpu_blocks == 20
    queue = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert queue[:4] == [12, 15, 19, 1]


@pytest.mark.parametrize("caching", [True, False])
def test_the_lowest_of_the_coldest_are_used_first(caching, monkeypatch):
    monkeypatch.setattr(lender, "WINDOW_BLOCKS", 6)
    pool = BlockPool(num_gpu_blocks=20, enable_caching=caching, hash_block_size=4)
    VllmPool(pool, Ghosts(5))
    order = random.Random(2).sample(range(1, 20), 19)
    blocks = {block.block_id: block for block in pool.get_new_blocks(19)}
    pool.free_blocks([blocks[id_] for id_ in order])
    assert [block.block_id for block in pool.get_new_blocks(1)] == [min(order[:6])]
    order.remove(min(order[:6]))
    lowest = sorted(order[:12])[:3]
    assert [block.block_id for block in pool.get_new_blocks(3)] == lowest
    left = [id_ for id_ in order if id_ not in lowest]
    queue = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert queue == left
    assert pool.get_new_blocks(0) == []
    with pytest.raises(ValueError, match="Cannot get 16"):
        pool.get_new_blocks(16)


def test_ordinary_evictions_are_remembered_too(pool):
    ghosts = Ghosts(50)
    cached(pool, list(range(1, 20)))
    VllmPool(pool, ghosts)
    pool.get_new_blocks(3)
    assert ghosts.wanted([id_.to_bytes(8, "big") for id_ in (1, 2, 3, 4)]) == (3, 3)
    pool.get_new_blocks(1)
    pool.free_blocks(block for block in pool.blocks if block.ref_cnt)
    assert pool.reset_prefix_cache()
    assert ghosts.wanted([(4).to_bytes(8, "big")]) == (0, 0)


def test_blocks_in_use_are_never_taken(pool):
    used = {block.block_id for block in pool.get_new_blocks(6)}
    shared = VllmPool(pool, Ghosts(5))
    assert set(shared.free_among(range(1, 20), 99)) == set(range(1, 20)) - used
    with pytest.raises(AssertionError):
        shared.take(sorted(used)[:1])


def test_readers_of_freed_blocks_hear_that_they_are_lent(pool):
    heard = []
    blocks = pool.get_new_blocks(2)
    pool.unpin_blocks(blocks, lambda block: heard.append(block.block_id))
    VllmPool(pool, Ghosts(5)).take([blocks[0].block_id])
    assert heard == [blocks[0].block_id]
