"""Pages, the metric set, and when a worker reports."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.engine_stats import EngineStats
from vllm_moe_offload.metrics import page
from vllm_moe_offload.metrics.families import PREFIX, OffloadCollector
from vllm_moe_offload.metrics.page import Page, Worker, layer_label
from vllm_moe_offload.metrics.reporter import Reporter, line

LAYER = LayerCounts("model.layers.0.mlp.experts", experts=8, slots=2, row_bytes=100, resident=2,
                    active=10, hits=4, loads=5, streams=1, surplus=3, prefetched=3,
                    prefetch_hits=2, guessed=9, found=7, foreseeable=8,
                    row_seconds=0.25)  # fmt: skip
OTHER = replace(LAYER, layer="model.layers.1.mlp.experts", active=11, hits=5)


def make_page(rank: int = 0, **fields) -> Page:
    layers = [replace(LAYER, layer="0"), replace(OTHER, layer="1")]
    return Page(Worker("served", 0, rank), 12.5, layers, 1600, 400, 200, **fields)


def samples(pages) -> dict[tuple, float]:
    """Value of every sample by its name without the prefix, and the labels that tell it apart."""
    registry = CollectorRegistry()
    registry.register(OffloadCollector(lambda: pages))
    text = generate_latest(registry).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.name.startswith(PREFIX)
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "served"
            assert labels.pop("engine") == "0"
            order = ("worker", "layer", "tier", "cause", "eviction", "predictor")
            values = [labels.pop(name) for name in order if name in labels]
            assert labels == {}
            found[sample.name.removeprefix(PREFIX), *values] = sample.value
    return found


def test_metric_set():
    policies = {"eviction": "lru", "predictor": "eam"}
    found = samples([make_page(policies=policies, pcie_bytes_per_s=2.5e10)])
    assert found == {
        ("hits_total", "0", "0"): 4, ("hits_total", "0", "1"): 5,
        ("misses_total", "0", "0"): 6, ("misses_total", "0", "1"): 6,
        ("bytes_total", "0", "0", "host", "demand"): 500,
        ("bytes_total", "0", "1", "host", "demand"): 500,
        ("bytes_total", "0", "0", "host", "wave"): 400,
        ("bytes_total", "0", "1", "host", "wave"): 400,
        ("bytes_total", "0", "0", "host", "prefetch"): 300,
        ("bytes_total", "0", "1", "host", "prefetch"): 300,
        ("transfer_seconds_total", "0", "0", "host", "demand"): 1.25,
        ("transfer_seconds_total", "0", "1", "host", "demand"): 1.25,
        ("transfer_seconds_total", "0", "0", "host", "wave"): 1,
        ("transfer_seconds_total", "0", "1", "host", "wave"): 1,
        ("transfer_seconds_total", "0", "0", "host", "prefetch"): 0.75,
        ("transfer_seconds_total", "0", "1", "host", "prefetch"): 0.75,
        ("stall_seconds_total", "0", "0"): 2.25, ("stall_seconds_total", "0", "1"): 2.25,
        ("prefetched_total", "0", "0"): 3, ("prefetched_total", "0", "1"): 3,
        ("prefetch_hits_total", "0", "0"): 2, ("prefetch_hits_total", "0", "1"): 2,
        ("predicted_total", "0", "0"): 9, ("predicted_total", "0", "1"): 9,
        ("predicted_hits_total", "0", "0"): 7, ("predicted_hits_total", "0", "1"): 7,
        ("foreseeable_total", "0", "0"): 8, ("foreseeable_total", "0", "1"): 8,
        ("prefetch_precision", "0", "0"): 2 / 3, ("prefetch_precision", "0", "1"): 2 / 3,
        ("prefetch_coverage", "0", "0"): 7 / 8, ("prefetch_coverage", "0", "1"): 7 / 8,
        ("resident_experts", "0", "0"): 2, ("resident_experts", "0", "1"): 2,
        ("slots", "0", "0"): 2, ("slots", "0", "1"): 2,
        ("experts", "0", "0"): 8, ("experts", "0", "1"): 8,
        ("pool_bytes", "0"): 1600, ("slot_bytes", "0"): 400, ("staging_bytes", "0"): 200,
        ("lent_bytes", "0"): 0,
        ("pcie_bytes_per_second", "0"): 2.5e10, ("snapshot_timestamp_seconds", "0"): 12.5,
        ("policy_info", "0", "lru", "eam"): 1,
    }  # fmt: skip


def test_every_worker_has_its_samples():
    one, two = samples([make_page(0)]), samples([make_page(0), make_page(1)])
    assert len(two) == 2 * len(one)
    assert ("pcie_bytes_per_second", "0") not in one


def test_boundary_of_a_shared_cache():
    found = samples([replace(make_page(), lent_bytes=300, boundary_block=70, kv_blocks=100)])
    names = ("lent_bytes", "boundary_block", "kv_blocks")
    assert [found[name, "0"] for name in names] == [300, 70, 100]


def test_no_share_of_nothing():
    idle = replace(LAYER, layer="0", prefetched=0, prefetch_hits=0, foreseeable=0, found=0)
    found = samples([replace(make_page(), layers=[idle])])
    assert found["prefetched_total", "0", "0"] == 0
    assert not {"prefetch_precision", "prefetch_coverage"} & {name for name, *_ in found}


def test_nothing_without_workers():
    assert samples([]) == {}


def test_page_survives_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv(page.FOLDER, str(tmp_path))
    pages = [make_page(rank, policies={"eviction": "lru"}) for rank in range(2)]
    for written in pages:
        written.write(page.page_path(written.worker))
    assert page.read_pages() == pages
    page.page_path(pages[0].worker).unlink()
    assert page.read_pages() == pages[1:]


def test_page_is_never_half_written(tmp_path, monkeypatch):
    monkeypatch.setenv(page.FOLDER, str(tmp_path))
    many = replace(make_page(), layers=[LAYER] * 200)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            many.write(page.page_path(many.worker))

    many.write(page.page_path(many.worker))
    thread = threading.Thread(target=write)
    thread.start()
    try:
        seen = [page.read_pages() for _ in range(200)]
    finally:
        stop.set()
        thread.join()
    assert all(pages == [many] for pages in seen)


def test_no_folder_no_page(monkeypatch):
    monkeypatch.delenv(page.FOLDER, raising=False)
    assert page.page_path(make_page().worker) is None
    assert page.read_pages() == []


FOLDERS = """
import json, multiprocessing, os, subprocess, sys
from vllm_moe_offload.metrics import page

def folder(queue):
    page.open_folder()
    queue.put(os.environ[page.FOLDER])

if __name__ == "__main__":
    page.open_folder()
    mine = os.environ[page.FOLDER]
    page.open_folder()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=folder, args=(queue,))
    child.start()
    seen = [mine, os.environ[page.FOLDER], queue.get()]
    child.join()
    if len(sys.argv) == 1:
        other = subprocess.run([sys.executable, "-P", __file__, "other"], capture_output=True,
                               text=True, check=True)
        seen += json.loads(other.stdout)
    print(json.dumps(seen))
"""


def test_a_server_and_its_children_share_a_folder(tmp_path):
    script = tmp_path / "folders.py"
    script.write_text(FOLDERS)
    result = subprocess.run(
        [sys.executable, "-P", script], capture_output=True, text=True, check=True, timeout=120
    )
    folders = json.loads(result.stdout)
    assert folders == [folders[0]] * 3 + [folders[3]] * 3
    assert folders[0] != folders[3]
    assert not any(Path(path).exists() for path in folders), (
        "a server that has ended leaves no folder"
    )


KILLED = """
import os, signal
from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.metrics import page

page.open_folder()
written = page.Page(page.Worker("served", 0, 0), 12.5, [], 800, 200, 100)
path = page.page_path(written.worker)
claim = page.claim_page(path)
written.write(path)
assert page.read_pages() == [written]
print(path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_leaves_is_not_served_and_goes(tmp_path, monkeypatch):
    result = subprocess.run(
        [sys.executable, "-P", "-c", KILLED],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    path = Path(result.stdout.strip())
    assert path.parent.parent == tmp_path, result.stderr
    assert path.exists()
    monkeypatch.setenv(page.FOLDER, str(path.parent))
    assert page.read_pages() == []

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(page, "_made", None)
    monkeypatch.setattr(page, "_claim", None)
    page.open_folder()
    assert not path.parent.exists()
    page._remove_orphans(tmp_path)
    assert Path(os.environ[page.FOLDER]).exists(), "its server is alive"
    page._made.cleanup()


@pytest.mark.parametrize(
    ("name", "label"),
    [("model.layers.13.mlp.experts", "13"), ("language_model.layers.0.experts", "0"),
     ("experts", "experts")],
)  # fmt: skip
def test_label_of_a_layer(name, label):
    assert layer_label(name) == label


class FakeEngine:
    """Counts that a test sets; ``torn`` readings are refused."""

    policies = {"eviction": "lru"}  # noqa: RUF012

    def __init__(self, interval: float) -> None:
        self.config = SimpleNamespace(stats_interval_s=interval)
        self.hits = self.readings = 0
        self.torn = False
        self.shared_blocks = None

    def layer_counts(self):
        return [replace(LAYER, active=LAYER.misses + self.hits, hits=self.hits)]

    def snapshot(self):
        self.readings += 1
        return None if self.torn else self.layer_counts()

    def total(self, layers) -> EngineStats:
        hits = sum(layer.hits for layer in layers)
        return EngineStats(
            layers=1, experts_in_pool=8, slots=2, resident=2, pool_bytes=800, slot_bytes=200,
            staging_bytes=0, active=6 + hits, hits=hits, misses=6, streamed=1, demand_bytes=500,
            wave_bytes=400, bytes_moved=900,
        )  # fmt: skip


@pytest.fixture
def make(monkeypatch, tmp_path):
    """Makes an engine and its reporter, at time 100, whose thread is never started."""
    monkeypatch.setenv(page.FOLDER, str(tmp_path))
    monkeypatch.setattr("time.monotonic", lambda: 100.0)

    def make(interval: float = 60, **fields):
        engine, lines, worker = FakeEngine(interval), [], Worker("served", 0, 0)
        path = page.page_path(worker)
        return engine, Reporter([engine], worker, path, lines.append, **fields), lines

    return make


def hits_on_page() -> list[int]:
    return [layer.hits for read in page.read_pages() for layer in read.layers]


def test_page_follows_the_steps(make):
    engine, reporter, _ = make()
    seen = []
    for hits in (0, 3, 7):
        engine.hits = hits
        reporter.note_step()
        reporter.tick(101.0)
        seen += hits_on_page()
    assert seen == [0, 3, 7]


def test_last_step_ends_after_the_first_reading(make):
    engine, reporter, _ = make()
    reporter.note_step()
    reporter.tick(101.0)
    engine.hits = 5  # the device has caught up
    reporter.tick(102.0)
    assert hits_on_page() == [5]
    reporter.tick(103.0)
    readings = engine.readings
    reporter.tick(104.0)
    assert engine.readings == readings, "an idle worker is read again and again"


def test_torn_reading_is_made_again(make):
    engine, reporter, _ = make()
    engine.hits, engine.torn = 5, True
    reporter.note_step()
    reporter.tick(101.0)
    assert hits_on_page() == []
    engine.torn = False
    reporter.tick(102.0)
    assert hits_on_page() == [5]


def test_nothing_is_read_while_asleep(make):
    engine, reporter, _ = make()
    reporter.note_step()
    reporter.pause()
    reporter.tick(101.0)
    assert engine.readings == 0
    reporter.note_step()
    reporter.tick(102.0)
    assert engine.readings == 1


def test_a_line_in_every_interval_with_steps(make):
    engine, reporter, lines = make(interval=60)
    written = []
    for now, steps in ((101, 1), (159.9, 1), (160, 0), (190, 1), (220, 0), (280, 0), (341, 1)):
        for _ in range(steps):
            reporter.note_step()
        reporter.tick(now)
        written.append(len(lines))
    assert written == [0, 0, 1, 1, 2, 2, 3]
    assert lines[0] == line(engine.total(engine.layer_counts()))


def test_no_lines(make):
    _, reporter, lines = make(interval=0)
    reporter.note_step()
    reporter.tick(1e9)
    reporter.close()
    assert lines == []


def test_line(make):
    engine, *_ = make()
    engine.hits = 6
    assert line(engine.total(engine.layer_counts())) == (
        "moe-offload: 50.0% of 12 active experts were in slots, 6 missed; moved 0.00 GiB (0.00 on "
        "demand, 0.00 in waves, 0.00 ahead) in 0.0 s, stalls of 0.0 s at most, 2 of 2 slots in use"
    )


def test_line_with_predictions(make):
    engine, *_ = make()
    stats = replace(
        engine.total(engine.layer_counts()), demand_bytes=1 << 30, prefetch_bytes=3 << 30,
        bytes_moved=4 << 30, transfer_seconds=2.54, stall_seconds=0.61, foreseeable=8, found=6,
    )  # fmt: skip
    moved = (
        "moved 4.00 GiB (1.00 on demand, 0.00 in waves, 3.00 ahead) in 2.5 s, stalls of 0.6 s at "
    )
    coverage = "most, 2 of 2 slots in use, 75.0% of active experts were foreseen"
    assert line(stats).endswith(moved + coverage)
    fetched = replace(stats, prefetched=10, prefetch_hits=9)
    assert line(fetched).endswith(moved + coverage + ", 90.0% of those moved ahead were read")


def test_thread_reports_and_ends(make):
    engine, reporter, lines = make(interval=0.01, link_rate=lambda: 2.5e10)
    reporter.start()
    assert [read.pcie_bytes_per_s for read in page.read_pages()] == [2.5e10]
    engine.hits = 9
    reporter.note_step()
    for _ in range(500):
        if hits_on_page() == [9]:
            break
        threading.Event().wait(0.01)
    assert hits_on_page() == [9]
    reporter.close()
    assert hits_on_page() == []
    assert lines == [line(engine.total(engine.layer_counts()))]


def test_failing_statistics_end_with_a_word(make, monkeypatch):
    engine, reporter, lines = make(interval=0.01)
    reporter.start()
    monkeypatch.setattr(engine, "snapshot", lambda: 1 / 0)
    reporter.note_step()
    reporter._thread.join(5)
    assert not reporter._thread.is_alive()
    assert lines == ["moe-offload: the statistics end here: ZeroDivisionError('division by zero')"]


def test_counts_of_a_layer():
    assert LAYER.is_whole
    assert not replace(LAYER, hits=3).is_whole
    assert (LAYER.misses, LAYER.demand_bytes, LAYER.wave_bytes) == (6, 500, 400)
    assert (LAYER.prefetch_bytes, LAYER.coverage, LAYER.precision) == (300, 7 / 8, 2 / 3)
    assert replace(LAYER, foreseeable=0).coverage is None
    assert replace(LAYER, prefetched=0).precision is None
    assert (LAYER.transfer_seconds, LAYER.stall_seconds) == (12 * 0.25, 9 * 0.25)
    assert LayerCounts(**asdict(LAYER)) == LAYER
