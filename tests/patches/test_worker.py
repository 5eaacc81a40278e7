import inspect
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import vllm.v1.worker.cpu_worker
import vllm.v1.worker.gpu_worker
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.engine_stats import EngineStats
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.metrics import page, reporter
from vllm_moe_offload.patches import cpu_worker, worker
from vllm_moe_offload.patches.wrapping import _MARK, PatchError

COUNTS = EngineStats(
    layers=2, experts_in_pool=16, slots=8, resident=5, pool_bytes=1600, slot_bytes=800,
    staging_bytes=200, active=10, hits=6, misses=4, streamed=1, demand_bytes=3, wave_bytes=1,
    bytes_moved=4,
)  # fmt: skip

IDLE = SchedulerOutput.make_empty()


LAYER = LayerCounts("model.layers.3.mlp.experts", 8, 4, 100, 5, 10, 6, 3, 1, 0, found=2,
                    foreseeable=4, prefetched=5, prefetch_hits=4, row_seconds=0.5)  # fmt: skip
SHARES = {"coverage": 0.5, "precision": 0.8, "transfer_seconds": 4.5, "stall_seconds": 2.0}


class FakeEngine:
    def __init__(self, interval: float = 60.0) -> None:
        self.config = SimpleNamespace(stats_interval_s=interval, trace_path=None)
        self.device = torch.device("cpu")
        self.borrows = False
        self.shared_blocks = None
        self.policies = {"eviction": "lru"}
        self.warm_up, self.closed = [], 0
        self.steps = []

    def step_begins(self, num_tokens: int, scheduled: int) -> None:
        self.steps.append(("begins", num_tokens, scheduled))

    def step_ended(self, next_tokens: int) -> None:
        self.steps.append(("ended", next_tokens))

    def layer_counts(self) -> list[LayerCounts]:
        return [LAYER]

    def snapshot(self) -> list[LayerCounts]:
        return [LAYER]

    def total(self, layers) -> EngineStats:
        assert layers == [LAYER]
        return COUNTS

    def rehearse(self) -> None:
        self.warm_up.append("rehearsal")

    def forget_routing(self) -> None:
        self.warm_up.append("routing")

    def reset_stats(self) -> None:
        self.warm_up.append("stats")

    def close(self) -> None:
        self.closed += 1


def make_class() -> type:
    """A worker as vLLM's, patched; its methods note that they ran."""

    class Worker:
        def __init__(self, engines=()):
            self.to_load, self.calls, self.rank = list(engines), [], 1
            self.vllm_config = SimpleNamespace(
                compilation_config=SimpleNamespace(max_cudagraph_capture_size=8),
                scheduler_config=SimpleNamespace(max_num_batched_tokens=100),
                model_config=SimpleNamespace(served_model_name=["served"]),
                parallel_config=SimpleNamespace(data_parallel_index=2),
            )

        def load_model(self, *, load_dummy_weights=False):
            self.calls.append("load_model")
            worker.engines_of_loading_worker().extend(self.to_load)

        def compile_or_warm_up_model(self):
            self.calls.append("compile_or_warm_up_model")
            for engine in self.to_load:
                engine.warm_up.append("vLLM's")
            return 1.5

        def initialize_from_config(self, kv_cache_config):
            self.calls.append("initialize_from_config")

        def execute_model(self, scheduler_output):
            self.calls.append("execute_model")
            return scheduler_output

        def sample_tokens(self, grammar_output):
            self.calls.append("sample_tokens")
            return grammar_output

        def sleep(self, level=1):
            self.calls.append(("sleep", level))

        def wake_up(self, tags=None):
            self.calls.append(("wake_up", tags))

        def save_sharded_state(self, path):
            self.calls.append(("save_sharded_state", path))

        def discard(self, tags):
            self.calls.append(("discard", tags))

        def reload_weights(self, *args, **kwargs):
            self.calls.append(("reload_weights", args, kwargs))

        def start_weight_update(self):
            self.calls.append("start_weight_update")

        def shutdown(self):
            self.calls.append("shutdown")

    worker.apply(SimpleNamespace(Worker=Worker))
    return Worker


def loaded(*engines: FakeEngine):
    made = make_class()(engines)
    made.load_model()
    made.calls.clear()
    return made


def test_engines_stay_with_the_worker_that_loads():
    engine, other = FakeEngine(), FakeEngine()
    assert loaded(engine).moe_offload_engines == [engine]
    assert loaded(other).moe_offload_engines == [other]
    outside = worker.engines_of_loading_worker()
    outside.append(engine)
    assert worker.engines_of_loading_worker() == []


def test_failing_load_leaves_no_list_behind():
    made = make_class()()
    made.to_load = None
    with pytest.raises(TypeError):
        made.load_model()
    assert worker._loading.get() is None


def test_sleep_at_level_2():
    made = loaded(FakeEngine())
    for sleep in (lambda: made.sleep(2), lambda: made.sleep(level=2)):
        with pytest.raises(OffloadError) as error:
            sleep()
        assert "sleep level = 2: " in str(error.value)
        assert "Use level 1, or restart the server" in str(error.value)
    assert made.calls == []


def test_sleep_at_level_1():
    made = loaded(FakeEngine())
    made.sleep()
    made.sleep(level=1)
    assert made.calls == [("sleep", 1), ("sleep", 1)]


@pytest.mark.parametrize("name", ["reload_weights", "start_weight_update"])
def test_new_weights(name):
    made = loaded(FakeEngine())
    with pytest.raises(OffloadError) as error:
        getattr(made, name)()
    assert "weights = reload: " in str(error.value)
    assert "Restart the server" in str(error.value)
    assert made.calls == []


def test_weights_are_not_saved_as_they_lie_in_the_pool():
    made = loaded(FakeEngine())
    with pytest.raises(OffloadError, match="Save them from a server without"):
        made.save_sharded_state("folder")
    assert made.calls == []


@pytest.mark.parametrize("was_loaded", [True, False])
def test_untouched_without_an_engine(was_loaded):
    made = loaded() if was_loaded else make_class()()
    made.sleep(2)
    made.reload_weights(1, b=2)
    made.start_weight_update()
    made.wake_up(["weights"])
    made.save_sharded_state("folder")
    assert made.execute_model("step") == "step"
    assert made.compile_or_warm_up_model() == 1.5
    made.shutdown()
    assert made.calls == [
        ("sleep", 2),
        ("reload_weights", (1,), {"b": 2}),
        "start_weight_update",
        ("wake_up", ["weights"]),
        ("save_sharded_state", "folder"),
        "execute_model",
        "compile_or_warm_up_model",
        "shutdown",
    ]
    assert made.moe_offload_stats() is None


def test_statistics_of_one_engine():
    stats = loaded(FakeEngine()).moe_offload_stats()
    assert stats.pop("by_layer") == [asdict(LAYER) | {"layer": "3", **SHARES}]
    assert stats.pop("policies") == {"eviction": "lru"}
    assert stats == COUNTS.as_dict()


def test_statistics_add_up():
    stats = loaded(FakeEngine(), FakeEngine()).moe_offload_stats()
    assert [layer["layer"] for layer in stats["by_layer"]] == ["3", "draft.3"]
    assert {name: stats[name] for name in COUNTS.as_dict()} == {
        name: 2 * count for name, count in COUNTS.as_dict().items()
    }


def test_warm_up_is_forgotten():
    engine = FakeEngine()
    made = loaded(engine)
    assert made.compile_or_warm_up_model() == 1.5
    assert made.calls == ["compile_or_warm_up_model"]
    assert engine.warm_up == ["rehearsal", "vLLM's", "routing", "stats"]


def test_warm_up_of_the_cpu_worker():
    class CPUWorker(make_class()):
        def compile_or_warm_up_model(self):
            return 2.5

    cpu_worker.apply(SimpleNamespace(CPUWorker=CPUWorker))
    engine = FakeEngine()
    made = CPUWorker([engine])
    made.load_model()
    assert made.compile_or_warm_up_model() == 2.5
    assert engine.warm_up == ["rehearsal", "routing", "stats"]


@pytest.fixture
def lines(monkeypatch):
    """What is logged."""
    lines = []
    monkeypatch.setattr(worker.logger, "info", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture
def pages(monkeypatch, tmp_path):
    monkeypatch.setenv(page.FOLDER, str(tmp_path))
    return page.read_pages


def test_page_of_a_warm_worker(pages):
    made = loaded(FakeEngine())
    assert pages() == []
    made.compile_or_warm_up_model()
    (written,) = pages()
    assert written.worker == page.Worker("served", engine=2, rank=1)
    made.compile_or_warm_up_model()
    assert len(pages()) == 1
    made.shutdown()
    assert pages() == []


def test_line_at_the_end(lines):
    made = loaded(FakeEngine())
    made.compile_or_warm_up_model()
    assert made.execute_model(IDLE) is IDLE
    made.shutdown()
    assert lines == [reporter.line(COUNTS)]


@pytest.mark.parametrize(("interval", "steps"), [(0, 1), (60, 0)])
def test_no_line_at_the_end(lines, interval, steps):
    made = loaded(FakeEngine(interval=interval))
    made.compile_or_warm_up_model()
    for _ in range(steps):
        made.execute_model(scheduler_output=IDLE)
    made.shutdown()
    assert lines == []


def test_sleeping_worker_is_not_read(monkeypatch):
    engine = FakeEngine()
    made = loaded(engine)
    made.compile_or_warm_up_model()
    made.execute_model(scheduler_output=IDLE)
    made.sleep(1)
    monkeypatch.setattr(engine, "snapshot", lambda: pytest.fail("read while asleep"))
    made.moe_offload_reporter.tick(0.0)
    made.shutdown()


@pytest.mark.parametrize("tags", [None, ["weights"], ["kv_cache", "weights"]])
def test_statistics_of_a_sleeping_worker_are_those_before(monkeypatch, tags):
    engine = FakeEngine()
    made = loaded(engine)
    before = made.moe_offload_stats()
    made.sleep(1)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "layer_counts", lambda: pytest.fail("read while asleep"))
        assert made.moe_offload_stats() == before
        made.wake_up(["kv_cache"])
        assert made.moe_offload_stats() == before
        made.sleep(1)
    made.wake_up(tags)
    monkeypatch.setattr(engine, "layer_counts", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.moe_offload_stats()


class FakeRecording:
    def __init__(self, worker, engine):
        self.engine, self.calls = engine, worker.calls

    def start(self):
        self.calls.append("start recording")

    def note(self, runner, scheduler_output, output):
        self.calls.append(("note", runner, scheduler_output, output))

    def settle(self):
        self.calls.append("settle")

    def close(self):
        self.calls.append("close recording")


@pytest.fixture
def recorded(monkeypatch):
    """A worker with two engines whose options say that it records."""
    monkeypatch.setattr(worker, "Recording", FakeRecording)
    engines = [FakeEngine(), FakeEngine()]
    for engine in engines:
        engine.config.trace_path = "somewhere"
    made = loaded(*engines)
    made.model_runner = "runner"
    return made


def test_the_model_that_is_served_is_recorded(recorded):
    assert recorded.moe_offload_recording.engine is recorded.moe_offload_engines[0]


def test_recording_begins_after_warm_up(recorded):
    recorded.compile_or_warm_up_model()
    assert recorded.calls == ["compile_or_warm_up_model", "start recording"]


def test_every_step_is_noted_after_it_ran(recorded):
    assert recorded.execute_model(scheduler_output=IDLE) is IDLE
    assert recorded.calls == ["execute_model", ("note", "runner", IDLE, IDLE)]


def test_sleep_comes_after_the_ring_is_empty(recorded):
    recorded.sleep(1)
    assert recorded.calls == ["settle", ("sleep", 1)]


def test_recording_ends_before_the_worker_does(recorded):
    recorded.shutdown()
    recorded.shutdown()
    assert recorded.calls == ["close recording", "shutdown", "shutdown"]


def test_no_recording_unless_asked_for(monkeypatch):
    monkeypatch.setattr(worker, "Recording", lambda *_: pytest.fail("recorded"))
    made = loaded(FakeEngine())
    made.execute_model(IDLE)
    made.sleep(1)
    made.compile_or_warm_up_model()
    made.shutdown()


def test_shutdown_closes_engines_once():
    engine = FakeEngine()
    made = loaded(engine)
    made.shutdown()
    made.shutdown()
    assert (made.calls, engine.closed) == (["shutdown", "shutdown"], 1)
    assert made.moe_offload_stats() is None


def test_method_that_is_gone():
    class Worker:
        def load_model(self):
            pass

    with pytest.raises(PatchError, match=r"Worker has no compile_or_warm_up_model"):
        worker.apply(SimpleNamespace(Worker=Worker))


@pytest.mark.parametrize(
    "name",
    ["load_model", "compile_or_warm_up_model", "execute_model", "reload_weights",
     "start_weight_update", "shutdown"],
)  # fmt: skip
def test_both_real_workers_are_patched(name):
    for kind in (vllm.v1.worker.gpu_worker.Worker, vllm.v1.worker.cpu_worker.CPUWorker):
        assert hasattr(inspect.getattr_static(kind, name), _MARK), f"{kind.__name__}.{name}"


@pytest.mark.parametrize("name", ["sleep", "discard"])
def test_sleep_of_the_real_worker_is_patched(name):
    """That of the CPU worker does nothing: vLLM has no allocator there that could unmap memory."""
    assert hasattr(getattr(vllm.v1.worker.gpu_worker.Worker, name), _MARK)


def test_engines_hear_of_steps_outside_graphs():
    engine = FakeEngine()
    made = loaded(engine)
    for tokens in (8, 9):
        step = SchedulerOutput.make_empty()
        step.total_num_scheduled_tokens = tokens
        made.execute_model(step)
    assert engine.steps == [
        ("begins", 0, 8), ("ended", 0), ("begins", 9, 9), ("ended", 0),
    ]  # fmt: skip


class FakeBorrowing:
    """Notes what a worker tells its half of a shared KV cache."""

    def __init__(self, owner, kv_cache_config, engine) -> None:
        self.owner, self.kv_cache_config, self.engine = owner, kv_cache_config, engine

    def follow(self, scheduler_output) -> None:
        self.owner.calls.append("follow")

    def attach(self, output):
        return "with a report", output

    def empty(self) -> None:
        self.owner.calls.append("empty")


@pytest.fixture
def borrower(monkeypatch):
    monkeypatch.setattr(worker, "Borrowing", FakeBorrowing)
    engine = FakeEngine()
    engine.borrows = True
    made = loaded(engine)
    made.initialize_from_config("cache")
    made.calls.clear()
    return made


def test_the_served_model_borrows_once_the_cache_is_there(borrower):
    borrowing = borrower.moe_offload_borrowing
    assert borrowing.kv_cache_config == "cache"
    assert borrowing.engine is borrower.moe_offload_engines[0]


def test_nobody_borrows_unless_planned():
    made = loaded(FakeEngine())
    made.initialize_from_config("cache")
    assert made.moe_offload_borrowing is None
    assert made.sample_tokens("grammar") == "grammar"


def test_orders_come_before_steps_and_reports_after(borrower):
    assert borrower.execute_model(IDLE) == ("with a report", IDLE)
    assert borrower.calls == ["follow", "execute_model"]
    assert borrower.sample_tokens("grammar") == ("with a report", "grammar")


def test_slots_are_emptied_before_sleep(borrower):
    borrower.sleep(1)
    assert borrower.calls == ["empty", ("sleep", 1)]


def test_slots_are_emptied_before_the_cache_alone_is_discarded(borrower):
    borrower.discard(("kv_cache",))
    assert borrower.calls == ["empty", ("discard", ("kv_cache",))]


def test_discarding_is_left_alone_where_nothing_is_borrowed():
    for made in (loaded(), loaded(FakeEngine())):
        made.discard(("kv_cache",))
        assert made.calls == [("discard", ("kv_cache",))]


def test_share_of_a_worker_that_offloads_nothing():
    assert loaded().moe_offload_share() is None
