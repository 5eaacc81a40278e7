"""Watching a server, from the text of /metrics to the terminal."""

import http.server
import io
import threading
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from rich.console import Console

from vllm_moe_offload import cli
from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.metrics.families import OffloadCollector
from vllm_moe_offload.metrics.page import Page, Worker
from vllm_moe_offload.watch.change import Change
from vllm_moe_offload.watch.sample import LayerSample, Sample, metrics_url
from vllm_moe_offload.watch.view import frame

VLLM = """\
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 100.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 40.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
"""

LAYER = LayerCounts("0", experts=8, slots=4, row_bytes=1000, resident=3, active=10, hits=6, loads=3,
                    streams=1, surplus=2, row_seconds=0.2)  # fmt: skip


def page(rank: int = 0, link: float | None = 3e10, **counts) -> Page:
    layers = [replace(LAYER, layer=label, **counts) for label in ("10", "2", "draft.0")]
    worker = Worker("m", 0, rank)
    return Page(worker, 50.0 + rank, layers, 24000, 12000, 0, {"eviction": "lru"}, link)


def text(*pages: Page) -> str:
    registry = CollectorRegistry()
    registry.register(OffloadCollector(lambda: pages))
    return VLLM + generate_latest(registry).decode()


def parse(*pages: Page, now: float = 7.0) -> Sample:
    sample = Sample.parse(text(*pages), now)
    assert sample is not None
    return sample


def test_sample_of_two_workers():
    sample = parse(page(0), page(1))
    assert list(sample.layers) == ["2", "10", "draft.0"]
    assert set(sample.layers.values()) == {LayerSample(hits=12, misses=8, resident=6, slots=8)}
    assert sample.bytes_by_cause == {"demand": 6 * 3000, "wave": 6 * 3000, "prefetch": 0}
    assert (sample.workers, sample.counted_at, sample.time) == (2, 50.0, 7.0)
    assert sample.transfer_seconds == pytest.approx(6 * 0.6 + 6 * 0.6)
    assert (sample.prefetched, sample.prefetch_hits) == (0, 0)
    assert (sample.foreseeable, sample.predicted_hits) == (0, 0)
    assert (sample.link_bytes_per_s, sample.slot_bytes) == (6e10, 24000)
    assert (sample.policies, sample.models) == ({"eviction": "lru"}, ("m",))
    assert (sample.generated_tokens, sample.prompt_tokens) == (100, 40)
    assert (sample.running, sample.waiting) == (3, 1)


def test_boundary_of_a_shared_cache():
    shared = replace(page(0), lent_bytes=3 << 30, boundary_block=70, kv_blocks=100)
    sample = parse(shared, replace(shared, worker=page(1).worker))
    assert (sample.boundary_block, sample.kv_blocks) == (140, 200)
    assert "70% below the boundary, 6 GiB lent to experts" in draw(sample, None)
    assert "boundary" not in draw(parse(page(0)), None)


def test_bound_is_unknown_if_one_link_is():
    assert parse(page(0), page(1, link=None)).link_bytes_per_s is None


def test_server_without_the_plugin():
    assert Sample.parse(VLLM, 0.0) is None


def later(sample: Sample, seconds: float = 2.0, **fields) -> Sample:
    times = {"time": sample.time + seconds, "counted_at": sample.counted_at + seconds}
    return replace(sample, **times | fields)


def test_change():
    before = parse(page())
    layers = {"10": before.layers["10"], "2": replace(before.layers["2"], hits=15, misses=5),
              "draft.0": replace(before.layers["draft.0"], misses=5)}  # fmt: skip
    after = later(before, layers=layers, bytes_by_cause={"demand": 13000.0, "wave": 9500.0},
                  transfer_seconds=before.transfer_seconds + 0.5, generated_tokens=150.0,
                  prompt_tokens=44.0)  # fmt: skip
    change = Change.between(before, after)
    assert change == Change(
        seconds=2.0,
        hit_ratio=9 / 11,
        hit_ratio_by_layer={"10": None, "2": 0.9, "draft.0": 0.0},
        bytes_per_s_by_cause={"demand": 2000.0, "wave": 250.0},
        transfer_share=0.25,
        generated_per_s=25.0,
        prompt_per_s=2.0,
    )
    assert change.bytes_per_s == 2250.0


@pytest.mark.parametrize(("counted_s", "rate"), [(2.5, 400), (1.5, 1000 / 1.5), (60, 1000 / 3),
                                                 (0, 0)])  # fmt: skip
def test_bytes_a_second_by_the_time_of_the_counters(counted_s, rate):
    before = parse(page())
    moved = 1000.0 if counted_s else 0.0
    after = later(before, counted_at=before.counted_at + counted_s,
                  bytes_by_cause={"demand": before.bytes_by_cause["demand"] + moved})  # fmt: skip
    change = Change.between(before, after)
    assert change is not None
    assert change.bytes_per_s == pytest.approx(rate)


def test_no_change():
    before = parse(page())
    assert Change.between(before, before) is None
    assert Change.between(before, later(before, generated_tokens=99.0)) is None
    assert Change.between(before, later(before, layers={})) is None
    fewer = {name: replace(layer, hits=1) for name, layer in before.layers.items()}
    assert Change.between(before, later(before, layers=fewer)) is None


def draw(sample: Sample, change: Change | None, **fields) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(frame("http://host/metrics", sample, change, **{"age_s": 3.2} | fields))
    return console.file.getvalue()


def test_frame():
    before = parse(page())
    after = later(before, generated_tokens=150.0,
                  bytes_by_cause={"demand": 3e9, "wave": 9000.0})  # fmt: skip
    drawn = draw(after, Change.between(before, after))
    assert "1 worker, eviction lru, counted 3 s ago" in drawn
    assert "25.0 generated, 0.0 prompt, 3 requests running, 1 waiting" in drawn
    assert "hit ratio  -, 60% since the start" in drawn
    assert "1.5 GB/s (demand 1.5 GB/s, wave 0 bytes/s), 5% of the PCIe bound 30.0 GB/s" in drawn
    assert "transfers  0% of the time" in drawn
    assert "foreseen" not in drawn
    assert "9 of 12 in use, 11.72 KiB" in drawn
    assert "layer      10 ██████░░░░  60% 3/4" in drawn


def test_frame_of_a_server_that_predicts():
    foreseen = {"found": 6, "foreseeable": 8, "guessed": 9}
    before = parse(page(**foreseen), page(1, **foreseen))
    drawn = draw(
        before, Change.between(before, later(before, transfer_seconds=before.transfer_seconds + 1))
    )
    assert "foreseen   75% of active experts, none moved ahead" in drawn
    assert "transfers  25% of the time" in drawn, "half of the time of one of two workers"
    drawn = draw(parse(page(**foreseen, prefetched=5, prefetch_hits=4)), None)
    assert "foreseen   75% of active experts, 80% of those moved ahead were read" in drawn


def test_frame_of_a_first_reading():
    drawn = draw(parse(page(link=None)), None, age_s=0.0, problem="it is gone")
    assert "counted just now" in drawn
    assert "-, PCIe bound not known" in drawn
    assert "it is gone" in drawn


def test_layers_of_a_large_model_fill_columns():
    layers = {str(n): LayerSample(n, 60 - n, 4, 4) for n in range(48)}
    drawn = draw(replace(parse(page()), layers=layers), None)
    assert len(drawn.splitlines()) < 26
    assert all(f"layer {n:2} " in drawn for n in range(48))


@pytest.mark.parametrize(
    "address", ["host:8000", "http://host:8000", "http://host:8000/", "http://host:8000/metrics",
                "http://host:8000/v1"],
)  # fmt: skip
def test_address(address):
    assert metrics_url(address) == "http://host:8000/metrics"


def test_address_of_another_kind():
    assert metrics_url("https://host/") == "https://host/metrics"
    with pytest.raises(OffloadError, match="ftp is not understood"):
        metrics_url("ftp://host")


@pytest.mark.parametrize("address", ["[::1", "", "http://", ":8000", "host:port", "host:99999"])
def test_address_of_no_server(address):
    with pytest.raises(OffloadError, match="it names no server"):
        metrics_url(address)


@pytest.fixture
def serve():
    """A server that answers with the texts that it is given, the last for good."""
    servers = []

    def start(*texts: str, status: int = 200) -> str:
        rest = list(texts)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write((rest.pop(0) if len(rest) > 1 else rest[0]).encode())

            def log_message(self, *_args) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def watch(*arguments: str) -> int:
    return cli.main(["watch", "--interval-s", "0.5", *arguments])


def test_once(serve, capsys):
    url = serve(text(page()), text(page(hits=12, active=16)))
    assert watch(url, "--once") == 0
    output = capsys.readouterr()
    assert output.err == ""
    assert "hit ratio  100%, 75% since the start" in output.out


@pytest.mark.parametrize(
    ("answer", "status", "problem"),
    [
        (VLLM, 200, "the server has no metrics of the plugin. Start it with --plugin moe-offload"),
        ("<html>\n<a href={x}>", 200, "what it answers are no metrics"),
        ("", 404, "the server answers 404 Not Found"),
    ],
)
def test_wrong_servers(serve, capsys, answer, status, problem):
    assert watch(serve(answer, status=status)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert problem in output.err


def test_no_server(capsys):
    assert watch("127.0.0.1:9", "--once") == 2
    assert "no server can be reached there" in capsys.readouterr().err


def test_live_view_outlives_a_server_that_goes_away(serve, capsys, monkeypatch):
    url = serve(text(page()), VLLM, text(page(hits=12, active=16)))
    naps = iter([None, None, KeyboardInterrupt])

    def sleep(_seconds: float) -> None:
        if (nap := next(naps)) is not None:
            raise nap

    monkeypatch.setattr("vllm_moe_offload.watch.command.time.sleep", sleep)
    assert watch(url) == 0
    assert "75% since the start" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0.4", "nan", "inf", "often"])
def test_bad_interval(capsys, value):
    with pytest.raises(SystemExit):
        cli.main(["watch", "host", "--interval-s", value])
    assert "--interval-s" in capsys.readouterr().err
