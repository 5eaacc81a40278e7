"""The workers' half: slots, bytes and order, over real tables and a real buffer."""

import random
import time
from types import SimpleNamespace

import pytest
import torch

from vllm_moe_offload.eviction import AdaptiveEviction
from vllm_moe_offload.kernels.operations import TRITON
from vllm_moe_offload.lending.borrower import Borrower
from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.lender import STALL_S, ZEROED_BYTES_PER_SECOND
from vllm_moe_offload.lending.orders import Order, ProtocolError
from vllm_moe_offload.lending.rows import borrowed_rows
from vllm_moe_offload.residencies import Residencies

HOST = torch.device("cpu")
BOUNDARY = Boundary(
    num_blocks=60, block_bytes=5000, row_bytes=(4096, 8192), floor_blocks=10, most_slots=12,
    least_increments=2,
)  # fmt: skip


class Worker:
    """Tables of two layers over a buffer, and what was settled."""

    def __init__(self, boundary: Boundary = BOUNDARY) -> None:
        size = boundary.num_blocks * boundary.block_bytes
        self.buffer = torch.zeros(size, dtype=torch.int8)
        slots = [boundary.max_increments] * len(boundary.row_bytes)
        self.residencies = Residencies([20, 18], slots, HOST, least_open=boundary.min_increments)
        self.traffic = SimpleNamespace(num_bytes=lambda: 5, bytes_per_second=2.0)
        self.settled: list[int] = []
        self.borrower = Borrower(boundary, self.buffer, self.residencies, self.traffic, self.settle)

    def settle(self) -> None:
        self.settled.append(self.residencies[0].num_open)

    def fill(self) -> None:
        """Let every open slot hold an expert, whose bytes are 255."""
        for layer, residency in enumerate(self.residencies):
            residency.fill(torch.arange(residency.num_open, dtype=torch.int32))
            residency.work.counters.zero_()
            rows_SB = borrowed_rows(self.buffer, self.borrower.boundary, layer)
            rows_SB[residency.first_open :].fill_(255)


def test_only_what_is_never_handed_back_is_open_at_first():
    worker = Worker()
    assert [residency.num_open for residency in worker.residencies] == [2, 2]
    assert worker.borrower.lent_bytes == 2 * 12288
    assert worker.borrower.report().increments == 0
    worker.borrower.check_integrity()


def test_random_orders():
    rng, worker, before = random.Random(3), Worker(), 2
    for number in range(1, 80):
        increments = rng.randint(2, BOUNDARY.max_increments)
        worker.borrower.follow(Order(number, increments))
        assert worker.settled[-1] == before, "slots closed before copies were there"
        assert worker.borrower.increments == increments
        assert worker.borrower.report() == worker.borrower._follower.report(5, 2.0)
        worker.borrower.check_integrity()
        own = BOUNDARY.first_block(increments) * BOUNDARY.block_bytes
        assert not worker.buffer[:own].any(), "bits of weights are left in vLLM's blocks"
        worker.residencies.check_integrity()
        for residency in worker.residencies:
            assert residency.num_resident() <= min(before, increments)
        worker.fill()
        before = increments


def test_weights_stay_in_slots_that_stay():
    worker = Worker()
    worker.borrower.follow(Order(1, 8))
    worker.fill()
    worker.borrower.follow(Order(2, 5))
    for layer in range(2):
        rows_SB = borrowed_rows(worker.buffer, BOUNDARY, layer)
        assert bool((rows_SB[BOUNDARY.max_increments - 5 :] == 255).all())


def test_a_lost_order_is_found_out():
    with pytest.raises(ProtocolError, match="after order 0"):
        Worker().borrower.follow(Order(2, 5))


def test_an_order_below_the_least_is_found_out():
    with pytest.raises(AssertionError, match="below the least"):
        Worker().borrower.follow(Order(1, 1))


def test_nothing_is_resident_in_a_buffer_that_was_discarded():
    worker = Worker()
    worker.borrower.follow(Order(1, 8))
    worker.fill()
    assert worker.residencies[0].num_resident() == 8
    worker.borrower.empty()
    for residency in worker.residencies:
        assert residency.num_resident() == 0
        assert residency.num_open == 8
        residency.check_integrity()


def test_a_layer_with_another_boundary_is_found_out():
    worker = Worker()
    worker.residencies[1].first_open = 3
    with pytest.raises(AssertionError, match="another boundary"):
        worker.borrower.check_integrity()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be held up")
def test_the_largest_move_of_a_step_holds_it_up_for_less_than_a_stall():
    """Of 48 layers of Qwen3-30B-A3B's shape, from the first launch to the last zero."""
    layers, row_bytes, device = 48, 9_437_184, torch.device("cuda")
    increments = max(1, int(STALL_S * ZEROED_BYTES_PER_SECOND) // (layers * row_bytes))
    block_bytes = 48 * 16 * 2 * 4 * 128 * 2
    boundary = Boundary(
        num_blocks=1 + -(-increments * layers * row_bytes // block_bytes), block_bytes=block_bytes,
        row_bytes=(row_bytes,) * layers, floor_blocks=1, most_slots=increments,
    )  # fmt: skip
    buffer = torch.zeros(boundary.num_blocks * block_bytes, dtype=torch.int8, device=device)
    eviction = AdaptiveEviction([128] * layers, [increments] * layers, device, TRITON)
    residencies = Residencies([128] * layers, [increments] * layers, device, eviction, least_open=0)
    traffic = SimpleNamespace(num_bytes=lambda: 0, bytes_per_second=0.0)
    borrower, seconds = Borrower(boundary, buffer, residencies, traffic, lambda: None), []
    for number in range(1, 60):
        torch.cuda.synchronize()
        start = time.perf_counter()
        borrower.follow(Order(number, increments * (number % 2)))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    borrower.check_integrity()
    assert sorted(seconds[10:])[-5] < STALL_S, f"{sorted(seconds)[-5] * 1e3:.1f} ms"
