"""Lending on vLLM's real scheduler and block pool: no block ever has two tenants."""

import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import scheduling
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tenants import Worker
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from vllm_moe_offload import plugin
from vllm_moe_offload.lending.boundary import Boundary, floor_blocks
from vllm_moe_offload.lending.controller import AutoPolicy, FixedPolicy, Policy
from vllm_moe_offload.lending.orders import Order, Report
from vllm_moe_offload.patches.scheduler import ORDER, start_lending

plugin.register()

STEPS = 100_000
"""Of the long runs together; where nothing is to do there is no step."""

NUM_BLOCKS, MAX_LEN = 64, 64
BOUNDARY = Boundary(
    num_blocks=NUM_BLOCKS,
    block_bytes=5000,
    row_bytes=(4096, 8192),
    floor_blocks=floor_blocks(NUM_BLOCKS, MAX_LEN // scheduling.BLOCK_SIZE, 0.1),
    most_slots=99,
    least_increments=1,
)


class Whim(FixedPolicy):
    """Wants the boundary to be anywhere, and gives way."""

    gives_way = True

    def decide(self, standing: Any) -> int:
        return self._increments

    def wants(self, increments: int) -> None:
        self._increments = increments


@pytest.fixture(scope="session")
def config(checkpoint) -> Callable[[bool], Any]:
    folder = checkpoint("mixtral")
    return cache(
        lambda overlap: scheduling.make_config(folder, max_model_len=MAX_LEN, overlap=overlap)
    )


class Watched:
    """A server whose books are checked after every step."""

    def __init__(self, config: Any, policy: Policy, *, boundary: Boundary = BOUNDARY) -> None:
        self.scheduler = scheduling.make_scheduler(config, boundary.num_blocks)
        self.boundary = boundary
        self.overlap = isinstance(self.scheduler, AsyncScheduler)
        self.server = scheduling.Server(self.scheduler, boundary, depth=1 + self.overlap)
        self.lending = start_lending(self.scheduler, boundary, policy, clock=self.server.clock)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.added: list[str] = []
        self.moves = self.steps = 0

    @property
    def ledger(self) -> Any:
        return self.lending.lender.ledger

    def add(self, prompt: list[int], max_tokens: int) -> None:
        self.added.append(self.server.add(prompt, min(max_tokens, MAX_LEN - len(prompt))))

    def step(self) -> None:
        if not self.server.busy:
            return
        output = self.server.step()
        self.steps += 1
        self.moves += hasattr(output, ORDER)
        self.check()
        if self.server.preempted_by_step or self._somebody_waits_for_blocks(output):
            assert self.ledger.lent <= self.boundary.min_increments
            assert not self.ledger.held

    def _somebody_waits_for_blocks(self, output: Any) -> bool:
        scheduler = self.scheduler
        return (
            bool(scheduler.waiting)
            and len(scheduler.running) < scheduler.max_num_running_reqs
            and output.total_num_scheduled_tokens < scheduler.max_num_scheduled_tokens
            and not scheduler.waiting.peek_request().num_stale_output_tokens
            # Whoever ended after the step was scheduled made room too late for it.
            and not self.server.freed_by_step
        )

    def check(self) -> None:
        ledger, pool = self.ledger, self.pool
        ledger.check_integrity()
        self.lending.lender.book.check_integrity()
        lent = set(self.boundary.blocks(0, ledger.lent))
        free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
        used = self.server.blocks_in_use()
        tenants = (lent, ledger.held, free, used)
        assert sum(map(len, tenants)) == self.boundary.num_blocks - 1, "lost or with two tenants"
        assert set().union(*tenants) == set(range(1, self.boundary.num_blocks))
        for id_ in lent | ledger.held:
            assert pool.blocks[id_].ref_cnt == 1
            assert pool.blocks[id_].block_hash is None
        vllms = self.boundary.num_blocks - 1 - ledger.num_withheld
        assert vllms + 1 >= self.boundary.floor_blocks or ledger.held
        assert self.boundary.first_block(ledger.lent) >= self.boundary.floor_blocks
        assert pool.get_usage() == pytest.approx(len(used) / vllms)
        assert self.scheduler.get_kv_cache_usage() == pool.get_usage()

    def drain(self) -> None:
        for _ in range(20_000):
            if not self.server.busy:
                break
            self.step()
        assert sorted(self.server.finished) == sorted(self.added), "a request did not finish"


def random_prompt(rng: random.Random) -> list[int]:
    """Prompts of few words, so that prefixes are shared."""
    head = [rng.randrange(2)] * rng.choice((4, 8, 16))
    return head + [rng.randrange(9) for _ in range(rng.randint(0, 30))]


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
@pytest.mark.parametrize("policy", ["whim", "auto"])
def test_long_run(config, overlap, policy):
    rng = random.Random(f"{overlap}{policy}")
    whim = Whim(0)
    watched = Watched(config(overlap), whim if policy == "whim" else AutoPolicy(BOUNDARY))
    rate = 0.1
    while watched.steps < STEPS // 4:
        if watched.steps % 500 == 0:
            rate = rng.choice((0.02, 0.1, 0.2, 0.4))
        if rng.random() < rate and len(watched.scheduler.requests) < 12:
            watched.add(random_prompt(rng), rng.randint(1, 24))
        if rng.random() < 0.05:
            whim.wants(rng.randint(0, BOUNDARY.max_increments))
        if rng.random() < 0.002:
            watched.scheduler.reset_prefix_cache(reset_running_requests=rng.random() < 0.3)
        watched.step()
    watched.drain()
    assert watched.moves > 200
    assert watched.server.preempted > 0
    assert watched.server.hit_tokens > 0


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, end, are aborted and preempted while the boundary moves."""

    config: Callable[[bool], Any]

    @initialize(overlap=st.booleans())
    def start(self, overlap):
        self.whim = Whim(0)
        self.watched = Watched(type(self).config(overlap), self.whim)
        self.aborted: set[str] = set()

    @rule(seed=st.integers(0, 999), tokens=st.integers(1, 40))
    def add(self, seed, tokens):
        if len(self.watched.scheduler.requests) < 15:
            self.watched.add(random_prompt(random.Random(seed)), tokens)

    @rule(increments=st.integers(0, BOUNDARY.max_increments))
    def move_boundary(self, increments):
        self.whim.wants(increments)

    @rule(count=st.integers(1, 12))
    def steps(self, count):
        for _ in range(count):
            self.watched.step()

    @rule(data=st.data())
    def abort(self, data):
        if names := sorted(self.watched.scheduler.requests):
            name = data.draw(st.sampled_from(names))
            self.watched.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self.watched.added.remove(name)

    @rule(preempt=st.booleans())
    def reset_prefix_cache(self, preempt):
        idle = not self.watched.server.blocks_in_use()
        done = self.watched.scheduler.reset_prefix_cache(reset_running_requests=preempt)
        assert done == (idle or preempt)
        if done:
            assert len(self.watched.pool.cached_block_hash_to_block) == 0

    @invariant()
    def books(self):
        if hasattr(self, "watched"):
            self.watched.check()

    def teardown(self):
        if hasattr(self, "watched"):
            self.watched.drain()


def test_state_machine(config):
    machine = type("Machine", (SchedulerMachine,), {"config": staticmethod(config)})
    case = machine.TestCase
    case.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
    case("runTest").runTest()


@pytest.fixture
def lent(config):
    """A server with everything lent that may be, and two short requests running."""
    watched = Watched(config(False), Whim(BOUNDARY.max_increments))
    for word in (1, 2):
        watched.add([word] * 4, 40)
    for _ in range(3):
        watched.step()
    assert watched.ledger.lent == BOUNDARY.max_increments
    return watched


def behind_the_step(worker: Worker) -> None:
    """Let orders be carried out when their step has been computed."""
    run = worker.run

    def late(output: Any) -> None:
        order = vars(output).pop(ORDER, None)
        run(output)
        if order is not None:
            worker._follow(order)

    worker.run = late


def without_zeros(worker: Worker) -> None:
    """Let bits of weights stay in blocks that go back."""
    follow = worker.borrower._follower.follow
    worker.borrower._follower.follow = lambda order: replace(follow(order), zeroed=range(0))


@pytest.mark.parametrize(
    ("broken", "message"),
    [(behind_the_step, "wrote into a slot|read NaN"), (without_zeros, "not zeroed")],
)
def test_a_worker_that_does_otherwise_is_found_out(lent, broken, message):
    broken(lent.server.worker)
    for word in range(3, 9):
        lent.add([word] * 28, 4)
    with pytest.raises(AssertionError, match=message):
        lent.drain()


def test_a_request_that_would_wait_is_admitted_in_the_same_step(lent):
    before = lent.ledger.lent
    for word in range(3, 6):
        lent.add([word] * 28, 4)
    lent.step()
    lent.step()
    lent.step()
    assert not lent.scheduler.waiting
    assert lent.ledger.lent < before
    assert lent.server.preempted == 0


def test_running_requests_grow_without_being_preempted(config):
    watched = Watched(config(False), Whim(BOUNDARY.max_increments))
    for word in range(1, 4):
        watched.add([word] * 4, 60)
    for _ in range(55):
        watched.step()
    assert watched.server.preempted == 0
    assert len(watched.scheduler.running) == 3
    assert watched.moves > 1


def test_a_fixed_split_stays(config):
    watched = Watched(config(False), FixedPolicy(5))
    rng = random.Random(1)
    for _ in range(12):
        watched.added.append(watched.server.add(random_prompt(rng), 18))
    while watched.server.busy:
        watched.server.step()
        watched.check()
        assert watched.ledger.lent == 5
    confirmed = watched.lending.lender.book.confirmed
    assert (confirmed.number, confirmed.increments) == (1, 5)


@pytest.mark.parametrize("watermark", [0.0, 0.1])
def test_the_longest_sequence_fits_beside_all_that_can_be_lent(checkpoint, watermark):
    """What vLLM has checked at its start stays true, although it did not know of a boundary."""
    config = scheduling.make_config(
        checkpoint("mixtral"), max_model_len=MAX_LEN, overlap=False, watermark=watermark
    )
    longest = MAX_LEN // scheduling.BLOCK_SIZE
    tight = replace(
        BOUNDARY, row_bytes=(4096,), floor_blocks=floor_blocks(NUM_BLOCKS, longest, watermark)
    )
    watched = Watched(config, FixedPolicy(tight.max_increments), boundary=tight)
    # Less than an increment is left over.
    spare = tight.first_block(tight.max_increments) - tight.floor_blocks
    assert 0 <= spare * tight.block_bytes < tight.increment_bytes + tight.block_bytes
    for word in (1, 2):
        watched.added.append(watched.server.add([word] * (MAX_LEN - 20), 20))
    for _ in range(4 * MAX_LEN):
        watched.server.step()
        watched.check()
        assert watched.ledger.lent == tight.max_increments
    assert sorted(watched.server.finished) == sorted(watched.added)


@pytest.mark.parametrize(("share", "most"), [(0.0, 19), (1.0, 0)])
def test_extremes_of_the_floor(config, share, most):
    floor = floor_blocks(NUM_BLOCKS, MAX_LEN // scheduling.BLOCK_SIZE, share)
    boundary = replace(BOUNDARY, floor_blocks=floor)
    watched = Watched(config(True), AutoPolicy(boundary), boundary=boundary)
    worker, lender = watched.server.worker, watched.lending.lender
    if order := lender.opens():
        worker._follow(order)
        lender.book.file(worker.report())
    assert watched.ledger.lent == boundary.max_increments == most
    for word in range(1, 9):
        watched.add([word] * 30, 30)
    watched.drain()


def test_the_prefix_cache_can_be_reset_while_blocks_are_lent(lent):
    assert not lent.scheduler.reset_prefix_cache()
    lent.drain()
    assert lent.ledger.lent > 0
    assert lent.pool.get_usage() == 0.0
    assert lent.scheduler.reset_prefix_cache()
    lent.check()


def test_usage_leaves_lent_blocks_out(lent):
    used = len(lent.server.blocks_in_use())
    share = used / (NUM_BLOCKS - 1 - lent.ledger.num_withheld)
    assert lent.scheduler.make_stats().kv_cache_usage == pytest.approx(share)
    assert lent.scheduler.get_kv_cache_usage() == pytest.approx(share)


def test_orders_travel_between_processes(config):
    watched = Watched(config(True), Whim(7))
    watched.add([1] * 8, 2)
    output = watched.scheduler.schedule()
    assert getattr(pickle.loads(pickle.dumps(output)), ORDER) == Order(1, 7)


def test_a_new_process_starts_from_nothing_lent(lent, config):
    assert lent.ledger.lent > 0
    again = Watched(config(False), Whim(3))
    again.check()
    assert again.lending.lender.book.confirmed == Report(0, 0)
    again.add([1] * 8, 2)
    again.drain()
    confirmed = again.lending.lender.book.confirmed
    assert (confirmed.number, confirmed.increments) == (1, 3)


def test_schedulers_that_lend_nothing_are_left_alone(config):
    scheduler = scheduling.make_scheduler(config(False), NUM_BLOCKS)
    server = scheduling.Server(scheduler, replace(BOUNDARY, least_increments=0))
    for word in range(8):
        server.add([word] * 20, 20)
    while server.busy:
        assert not hasattr(server.step(), ORDER)
    assert len(server.finished) == 8
    assert scheduler.kv_cache_manager.block_pool.num_gpu_blocks == NUM_BLOCKS


def test_a_boundary_of_another_buffer_is_refused(config):
    scheduler = scheduling.make_scheduler(config(False), NUM_BLOCKS - 1)
    with pytest.raises(AssertionError, match="another buffer"):
        start_lending(scheduler, BOUNDARY, FixedPolicy(1))


def test_moved_targets_are_refused():
    from vllm_moe_offload.patches import block_pool, scheduler
    from vllm_moe_offload.patches.wrapping import PatchError

    empty = type("Empty", (), {})
    with pytest.raises(PatchError, match="has no get_new_blocks"):
        block_pool.apply(SimpleNamespace(BlockPool=empty))
    with pytest.raises(PatchError, match="has no schedule"):
        scheduler.apply(SimpleNamespace(Scheduler=empty, KVCacheManager=empty))
