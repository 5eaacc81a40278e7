"""The route ``/metrics`` of real vLLM, as one of several API servers and as the only one."""

import pytest
import vllm.entrypoints.serve.instrumentator.metrics as vllm_metrics
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.metrics import page


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv(page.FOLDER, str(tmp_path))
    return tmp_path


def write(folder, rank: int, hits: int) -> None:
    layer = LayerCounts("3", 8, 4, 100, 4, hits + 1, hits, 1, 0, 0)
    worker = page.Worker("served", engine=0, rank=rank)
    page.Page(worker, 1.5, [layer], 800, 400, 0).write(folder / f"{rank}.json")


def scrape() -> str:
    app = FastAPI()
    vllm_metrics.attach_router(app)
    answer = TestClient(app).get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text


def hits(rank: int, count: int) -> str:
    labels = f'engine="0",layer="3",model_name="served",worker="{rank}"'
    return f"vllm_moe_offload_hits_total{{{labels}}} {count}.0\n"


@pytest.mark.parametrize("several", [False, True], ids=["one server", "several servers"])
def test_all_workers_are_exposed(monkeypatch, folder, several):
    if several:
        shared = folder / "shared"
        shared.mkdir()
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(shared))
    write(folder, rank=0, hits=5)
    write(folder, rank=1, hits=6)
    for _ in range(2):  # a second app must not count twice
        text = scrape()
        assert text.count(hits(0, 5)) == text.count(hits(1, 6)) == 1


def test_nothing_is_exposed_without_offloading(monkeypatch, folder):
    assert "moe_offload" not in scrape()
    monkeypatch.delenv(page.FOLDER)
    assert "moe_offload" not in scrape()


@pytest.mark.parametrize("offloads", [False, True])
def test_route_of_several_servers_is_replaced_only_with_offloading(monkeypatch, folder, offloads):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    if not offloads:
        monkeypatch.delenv(page.FOLDER)
    app = FastAPI()
    vllm_metrics.attach_router(app)
    first = next(route for route in app.routes if getattr(route, "path", "") == "/metrics")
    assert (first.endpoint.__module__ == "vllm_moe_offload.patches.metrics") == offloads
