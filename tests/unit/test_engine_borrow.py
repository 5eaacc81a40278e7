"""An engine whose slots are borrowed, against one that has its own, bit for bit."""

import random

import numpy as np
import pytest
import torch

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.orders import Order
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing

E, HIDDEN, INTERMEDIATE, K, LAYERS = 12, 16, 8, 3, 2
LAYOUT = ExpertLayout.pack(
    [
        ("w13_weight", (2 * INTERMEDIATE, HIDDEN), torch.float32),
        ("w2_weight", (HIDDEN, INTERMEDIATE), torch.float32),
    ]
)


def build(*, borrows: bool, **options) -> OffloadEngine:
    staging = {"staging_mb": 4 * LAYOUT.row_bytes / 2**20}
    engine = OffloadEngine(MoeOffloadConfig.parse({**staging, **options}), torch.device("cpu"))
    engine.borrows = borrows
    routing = Routing(num_experts=E, top_k=K, id_of_E=tuple(range(E)))
    for number in range(LAYERS):
        engine.add_layer(LayerSpec(str(number), E, LAYOUT, Activation("silu"), routing=routing))
    engine.plan()
    generator = torch.Generator().manual_seed(0)
    for segment in engine.pool.segments:
        for view in segment.views().values():
            view.normal_(generator=generator)
    engine.finish_loading()
    return engine


def boundary_of(engine: OffloadEngine, least: int = 1) -> Boundary:
    rows = tuple(spec.layout.row_bytes for spec in engine.specs)
    return Boundary(
        num_blocks=40, block_bytes=3000, row_bytes=rows, floor_blocks=4, most_slots=E,
        least_increments=least,
    )  # fmt: skip


def borrow(engine: OffloadEngine, least: int = 1) -> torch.Tensor:
    boundary = boundary_of(engine, least)
    buffer = torch.zeros(boundary.num_blocks * boundary.block_bytes, dtype=torch.uint8)
    engine.borrow(buffer, boundary)
    return buffer


def run(engine: OffloadEngine, tokens: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(tokens, HIDDEN, generator=generator)
    weight_TK = torch.rand(tokens, K, generator=generator)
    results = []
    for layer in range(LAYERS):
        ids_TK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)])
        results.append(engine.run(layer, x_TH, weight_TK, ids_TK))
    return results


@pytest.mark.parametrize(
    ("policy", "ahead"),
    [("lru", {}), ("adaptive", {}), ("adaptive", {"predictor": "markov", "prefetch_mb": 1})],
    ids=["lru", "adaptive", "ahead"],
)
@pytest.mark.parametrize("least", [0, 1, 3])
def test_the_same_bits_wherever_the_boundary_is(policy, ahead, least):
    mine = build(borrows=True, policy=policy, **ahead)
    theirs = build(borrows=False, policy=policy, cache_fraction=0.5)
    assert all(map(torch.equal, run(mine, 5, 99), run(theirs, 5, 99)))  # everything streams
    buffer, rng = borrow(mine, least), random.Random(least)
    for step in range(60):
        if step and rng.random() < 0.7:
            increments = rng.randint(least, mine.borrower.boundary.max_increments)
            mine.borrower.follow(Order(mine.borrower._follower.number + 1, increments))
        tokens = rng.choice((1, 2, 5, 30, 80))
        assert all(map(torch.equal, run(mine, tokens, step), run(theirs, tokens, step)))
        mine.check_integrity()
        first = mine.borrower.boundary.first_block(mine.borrower.increments)
        assert not buffer[: first * mine.borrower.boundary.block_bytes].any()
    assert mine.stats().hits > 0
    assert (mine.stats().prefetched > 0) == bool(ahead)


def test_statistics_tell_what_is_open():
    engine = build(borrows=True)
    assert engine.stats().slots == engine.stats().slot_bytes == 0
    borrow(engine)
    engine.borrower.follow(Order(1, 4))
    stats = engine.stats()
    assert stats.slots == 4 * LAYERS
    assert stats.lent_bytes == stats.slot_bytes == 4 * LAYERS * LAYOUT.row_bytes
    assert [layer.slots for layer in engine.layer_counts()] == [4, 4]


def test_a_warm_start_goes_on_when_slots_open():
    engine = build(borrows=True)
    borrow(engine)
    assert engine.refill_slots() is None
    scores = [np.arange(E, dtype=np.float64) for _ in range(LAYERS)]
    assert engine.fill_slots(scores) == LAYERS
    engine.borrower.follow(Order(1, 5))
    assert engine.refill_slots() == 5 * LAYERS
    engine.check_integrity()
    resident = engine.residency(0).tables.slot_of_E >= 0
    assert resident.nonzero().flatten().tolist() == [7, 8, 9, 10, 11]


def test_the_report_counts_what_was_moved(monkeypatch):
    monkeypatch.setattr("vllm_moe_offload.traffic.PERIOD_S", 0.0)
    engine = build(borrows=True)
    borrow(engine)
    engine.borrower.follow(Order(1, 4))
    run(engine, 5, 0)
    engine.borrower.report()  # asks
    report = engine.borrower.report()
    assert (report.number, report.increments) == (1, 4)
    assert report.miss_bytes == engine.stats().bytes_moved > 0
    assert report.bytes_per_second > 0


def test_nothing_is_borrowed_unless_planned():
    engine = build(borrows=False, cache_fraction=0.25)
    with pytest.raises(AssertionError, match="slots of its own"):
        borrow(engine)
