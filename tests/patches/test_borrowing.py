"""A worker's half around vLLM's objects: buffer, boundary, reports, and the line at the start."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheTensor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.lending.boundary import floor_blocks
from vllm_moe_offload.lending.controller import AutoPolicy, FixedPolicy
from vllm_moe_offload.lending.orders import Order, Report
from vllm_moe_offload.patches import borrowing, lending
from vllm_moe_offload.patches.borrowing import Borrowing, Share
from vllm_moe_offload.patches.scheduler import ORDER, REPORT
from vllm_moe_offload.patches.wrapping import PatchError

PAGE, LAYERS, BLOCKS = 4096, 2, 100
ROW = 8192
REPORTED = Report(3, 4, 5, 6.0)


class FakeEngine:
    """Two layers of six experts, of which a token chooses two."""

    def __init__(self, **options) -> None:
        self.config = MoeOffloadConfig.parse(options)
        spec = SimpleNamespace(
            layout=SimpleNamespace(row_bytes=ROW), num_experts=6, routing=SimpleNamespace(top_k=2)
        )
        self.specs = [spec, spec]
        self.refilled = 0
        self.followed = []

    def borrow(self, buffer, boundary):
        self.buffer, self.boundary = buffer, boundary
        return SimpleNamespace(
            boundary=boundary, follow=self.followed.append,
            report=lambda: REPORTED,
        )  # fmt: skip

    def refill_slots(self):
        self.refilled += 1


def cache_config(**changes):
    tensor = {
        "size": BLOCKS * LAYERS * PAGE, "layers": ["0", "1"], "layer_stride": PAGE,
        "block_stride": LAYERS * PAGE,
    }  # fmt: skip
    group = SimpleNamespace(kv_cache_spec=SimpleNamespace(block_size=16))
    return SimpleNamespace(
        num_blocks=BLOCKS,
        kv_cache_tensors=[KVCacheTensor(**tensor | changes)],
        kv_cache_groups=[group],
    )


def make(engine, config=None, *, max_model_len=160, watermark=0.0):
    with torch.inference_mode():
        memory = torch.zeros(BLOCKS * LAYERS * PAGE, dtype=torch.int8)
        caches = [memory[:PAGE], memory[PAGE:]]
    worker = SimpleNamespace(
        model_runner=SimpleNamespace(kv_caches=caches),
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=max_model_len),
            scheduler_config=SimpleNamespace(watermark=watermark),
            speculative_config=None,
        ),
    )
    return Borrowing(worker, config or cache_config(), engine)


def test_boundary_of_the_buffer():
    engine = FakeEngine(kv_floor=0.2)
    make(engine, watermark=0.05)
    boundary = engine.boundary
    assert (boundary.num_blocks, boundary.block_bytes) == (BLOCKS, LAYERS * PAGE)
    assert boundary.row_bytes == (ROW, ROW)
    assert boundary.floor_blocks == floor_blocks(BLOCKS, 10, 0.25) == 36
    assert boundary.most_slots == boundary.max_increments == 6
    # Two slots a layer take a twenty-fifth of the buffer.
    assert boundary.min_increments == 2


def test_slots_for_a_token_that_are_too_dear_are_handed_back(monkeypatch):
    monkeypatch.setattr(borrowing, "LEAST_SHARE", 1 / 30)
    engine = FakeEngine()
    make(engine)
    assert engine.boundary.min_increments == 0


def test_a_fixed_split_is_never_handed_back():
    engine = FakeEngine(kv_policy="fixed", kv_floor=0.82)
    make(engine)
    assert engine.boundary.min_increments == engine.boundary.max_increments == 3


def test_no_room_beyond_one_sequence():
    engine = FakeEngine()
    make(engine, max_model_len=1600)
    assert engine.boundary.max_increments == 0


def test_the_buffer_can_be_written_to_outside_of_inference():
    engine = FakeEngine()
    make(engine)
    assert engine.buffer.numel() == BLOCKS * LAYERS * PAGE
    assert not engine.buffer.is_inference()
    engine.buffer.fill_(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"size": 12345}, "are not 12345"), ({"block_stride": PAGE}, "are not")],
)
def test_a_cache_that_is_laid_out_otherwise(changes, message):
    with pytest.raises(PatchError, match=message) as caught:
        make(FakeEngine(), cache_config(**changes))
    assert "--moe-offload-gpu-gb" in str(caught.value)


def test_orders_are_followed_once():
    engine = FakeEngine()
    made, order = make(engine), Order(1, 4)
    made.follow(SimpleNamespace())
    made.follow(SimpleNamespace(**{ORDER: order}))
    assert engine.followed == [order]


def test_a_warm_start_fills_what_opens_before_the_first_step():
    engine = FakeEngine()
    made = make(engine)
    assert made.follow_at_once(Order(1, 4)) == REPORTED
    assert (engine.followed, engine.refilled) == ([Order(1, 4)], 1)
    made.follow(SimpleNamespace())
    made.follow_at_once(Order(2, 3))
    assert engine.refilled == 1


def test_an_output_carries_a_report():
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    made = make(FakeEngine())
    assert made.attach(output) is output
    assert getattr(output, REPORT) == REPORTED


def test_an_output_that_steps_share_stays_as_it_is():
    attached = make(FakeEngine()).attach(EMPTY_MODEL_RUNNER_OUTPUT)
    assert getattr(attached, REPORT) == REPORTED
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, REPORT)


def test_a_late_output_carries_it_when_it_is_there():
    class Late(AsyncModelRunnerOutput):
        def get_output(self):
            return EMPTY_MODEL_RUNNER_OUTPUT

        def get_kv_connector_output(self):
            return None

    late = Late()
    attached = make(FakeEngine()).attach(late)
    assert attached is late
    assert getattr(attached.get_output(), REPORT) == REPORTED


@pytest.mark.parametrize("nothing", [None, "tensors of the next stage"])
def test_what_is_no_output_carries_nothing(nothing):
    assert make(FakeEngine()).attach(nothing) is nothing


def test_policies():
    engine = FakeEngine(kv_policy="fixed")
    make(engine)
    policy = lending._policy(engine.config, engine.boundary)
    assert isinstance(policy, FixedPolicy)
    assert policy.decide(None) == 6
    assert isinstance(lending._policy(MoeOffloadConfig(), engine.boundary), AutoPolicy)


def share(boundary, reason=None):
    return Share(
        boundary, reason, total_bytes=24 << 30, dense_bytes=3 << 30, layers=2, slots=3, experts=12
    )


def test_line_at_the_start():
    engine = FakeEngine()
    make(engine)
    cache = SimpleNamespace(num_gpu_blocks=BLOCKS, block_size=16)
    line = lending.describe([share(engine.boundary)], 4, cache)
    assert line == (
        "24 GiB for vLLM, 3 GiB dense weights, slots for 8 of 12 experts, KV cache of 1472 tokens, "
        "boundary at block 92 of 100, never below 88; 64 KiB are lent"
    )
    line = lending.describe([share(None, "it is a test")] * 2, 0, cache)
    assert line == (
        "in each of 2 workers 24 GiB for vLLM, 3 GiB dense weights, slots for 3 of 12 experts, "
        "KV cache of 1600 tokens, not shared: it is a test"
    )


def test_the_line_of_a_hybrid_model_counts_tokens_as_vllm_does():
    """Its layers take blocks in groups, so that the cache holds fewer tokens than its blocks."""
    cache = SimpleNamespace(num_gpu_blocks=BLOCKS, block_size=16, kv_cache_size_tokens=777)
    assert "KV cache of 777 tokens" in lending.describe([share(None, "hybrid")], 0, cache)


@pytest.mark.parametrize(
    ("attributes", "kv_bytes", "total"),
    [
        ({"requested_memory": 100.0}, None, 100),
        ({"requested_cpu_memory": 90}, None, 90),
        ({"requested_memory": 100}, 64, 0),
        ({}, None, 0),
    ],
)
def test_what_vllm_may_take_of_the_device(attributes, kv_bytes, total):
    cache = SimpleNamespace(kv_cache_memory_bytes=kv_bytes)
    worker = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache), **attributes)
    assert borrowing._total_bytes(worker) == total


def test_a_cache_of_several_groups_is_refused():
    config = cache_config()
    config.kv_cache_groups *= 2
    with pytest.raises(PatchError, match="2 groups"):
        make(FakeEngine(), config)


@pytest.mark.parametrize(("max_model_len", "warns"), [(1600, True), (160, False)])
def test_experts_without_any_room_are_pointed_out(monkeypatch, max_model_len, warns):
    engine, said = FakeEngine(), []
    make(engine, max_model_len=max_model_len)
    monkeypatch.setattr(lending.logger, "warning", said.append)
    monkeypatch.setattr(lending, "start_lending", lambda *_: SimpleNamespace(
        lender=SimpleNamespace(opens=lambda: None, ledger=SimpleNamespace(lent=0))
    ))  # fmt: skip
    core = SimpleNamespace(
        model_executor=SimpleNamespace(collective_rpc=lambda _: [share(engine.boundary)]),
        scheduler=None,
        vllm_config=SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=BLOCKS, block_size=16)
        ),
    )
    lending._start(core, engine.config)
    assert said == [lending.NO_ROOM] * warns


def test_workers_that_disagree():
    one, two = FakeEngine(), FakeEngine(kv_floor=0.5)
    make(one)
    make(two)
    assert lending._agreed([share(one.boundary)] * 2) == one.boundary
    with pytest.raises(AssertionError, match="different boundaries"):
        lending._agreed([share(one.boundary), share(two.boundary)])
