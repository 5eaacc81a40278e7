"""The suite that compares predictors: what it asks for, and how it judges."""

import numpy as np
import prediction
import pytest
from shapes import SHAPES
from traces import random_trace

NAMES = {"markov", "eam", "gate"}


def row(configuration: str, seconds: float, batch: int = 1) -> dict[str, object]:
    return {"configuration": configuration, "case": "decode", "batch": batch, "seconds": seconds}


@pytest.mark.parametrize("shape", ["tiny", "qwen3-30b-a3b-top6", "deepseek-v2-lite"])
def test_every_predictor_at_every_share_beside_stock(shape):
    jobs = prediction.prediction(shape, {"staging_mb": 64}, "/a/trace.npz")
    assert len({job["name"] for job in jobs}) == len(jobs)
    for share in prediction.SHARES:
        alike = [job for job in jobs if job["share"] == share]
        offloads = [job["settings"].get("moe_offload") for job in alike]
        assert offloads.count(None) == 1
        options = [offload for offload in offloads if offload]
        assert {offload.get("predictor") for offload in options} == {None, *NAMES}
        assert all(offload["staging_mb"] == 64 for offload in options)
    for job in jobs:
        assert (job["kind"], job["trace"]) == ("replay", "/a/trace.npz")
        longest = max(plan["steps"] + plan["warm_up"] for plan in job["measurements"])
        assert longest < job["settings"]["max_model_len"] - 64


def test_an_expert_may_be_fetched():
    for name, shape in SHAPES.items():
        jobs = prediction.prediction(name, {}, "")
        sizes = [job["settings"].get("moe_offload", {}).get("prefetch_mb") for job in jobs]
        assert any(sizes)
        assert all(size * (1 << 20) >= shape.expert_bytes for size in sizes if size)


def test_the_shape_of_a_trace(tmp_path):
    path = tmp_path / "trace.npz"
    random_trace(0, tokens=5, layers=4, experts=16, top_k=4).save(path)
    assert prediction.shape_of(path) == "tiny"
    assert np.load(path)["num_experts"] == 16


def test_verdicts():
    rows = [row("lru 0.25", 2.0), row("cpu-offload 0.25", 5.5), row("lru 0.25", 9.0, batch=8),
            row("none, one sequence 0.25", 2.0), row("gate auto 0.25", 2.1)]  # fmt: skip
    stock, useless = prediction.verdicts(rows)
    assert stock["passed"]
    assert stock["values"] == {"lru 0.25": 2.75}
    assert useless["passed"] is False
    assert useless["values"] == {"share 0.25": pytest.approx(1.05)}
    assert [verdict["passed"] for verdict in prediction.verdicts([])] == [None, None]
