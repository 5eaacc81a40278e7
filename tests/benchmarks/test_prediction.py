"""The suite that compares predictors: what it asks for, and how it judges."""

import numpy as np
import prediction
import pytest
from shapes import SHAPES
from traces import random_trace

from vllm_moe_offload.config import MoeOffloadConfig

PREDICTORS = {"markov", "eam", "gate"}


def row(configuration, seconds, batch=1, **more):
    about = {"server": "plugin", "share": 0.25, "shape": "qwen3-30b-a3b-top6", "uniform": False}
    return {**about, "configuration": configuration, "batch": batch, "seconds": seconds, **more}


@pytest.mark.parametrize("shape", ["tiny", "qwen3-30b-a3b-top6", "deepseek-v2-lite"])
def test_every_policy_and_predictor_at_every_share_beside_stock(shape):
    asked = prediction.prediction(shape, {"staging_mb": 64}, "/a/trace.npz")
    labels = prediction.names(asked)
    assert len(set(labels)) == len(labels)
    *stock, ours = asked
    assert [job["share"] for job in stock] == list(prediction.SHARES)
    for share in prediction.SHARES:
        alike = [engine["options"] for engine in ours["engines"] if engine["share"] == share]
        assert {options.get("predictor") for options in alike} == {None, *PREDICTORS}
        assert {options.get("policy") for options in alike} >= {"lru", "adaptive"}
        for options in alike:
            assert options["staging_mb"] == 64
            assert MoeOffloadConfig.parse(options).cache_fraction == share
    for job in asked:
        assert job["trace"] == "/a/trace.npz"
        assert {plan["batch"] for plan in job["measurements"]} == {1, 8, 32}


@pytest.mark.parametrize("shape", ["tiny", "deepseek-v2-lite"])
def test_a_server_can_take_what_it_is_asked(shape):
    for job in prediction.prediction(shape, {}, ""):
        runs = [run for engine in job.get("engines", []) for run in engine["runs"]]
        plans = [plan for run in runs for plan in run["measurements"]] or job["measurements"]
        longest = max(plan["steps"] + plan["warm_up"] for plan in plans)
        longest = max([longest, *(run["settle"] for run in runs)])
        assert longest < job["settings"]["max_model_len"] - 64
        assert job["settings"]["max_num_seqs"] == 32


def test_an_expert_may_be_fetched():
    for name, shape in SHAPES.items():
        sizes = [e["options"].get("prefetch_mb") for e in prediction.engines(name, {})]
        assert any(sizes)
        assert all(size * (1 << 20) >= shape.expert_bytes for size in sizes if size)


def test_some_configurations_alone():
    asked = prediction.prediction("tiny", {}, "")
    stock, ours = prediction.only(asked, ["cpu-offload 0.25", "eam 0.5", "lru 0.25"])
    assert stock["name"] == "cpu-offload 0.25"
    assert [engine["name"] for engine in ours["engines"]] == ["lru 0.25", "eam 0.5"]
    assert prediction.only(asked, None) == asked


def test_the_shape_of_a_trace(tmp_path):
    path = tmp_path / "trace.npz"
    random_trace(0, tokens=5, layers=4, experts=16, top_k=4).save(path)
    assert prediction.shape_of(path) == "tiny"
    assert np.load(path)["num_experts"] == 16


def test_a_row_beside_stock_and_beside_its_transfers():
    rows = [
        row("cpu-offload 0.25", 5.5, server="cpu-offload"),
        row("all in slots", 1.0, share=1.0),
        row("lru 0.25", 2.0, transfer_seconds=1.25),
        row("lru 0.25", 9.0, batch=8, transfer_seconds=1.0),
        row("uniform", 2.0, uniform=True, transfer_seconds=4.0),
    ]
    _, _, lru, other, uniform = prediction.set_beside(rows)
    assert lru["hidden"] == pytest.approx(0.2)  # 2.25 if one came after the other
    assert lru["of_stock"] == pytest.approx(2.75)
    assert not {"hidden", "of_stock"} & other.keys()
    assert uniform["hidden"] == pytest.approx(0.75)
    assert "of_stock" not in uniform


def test_verdicts():
    rows = [
        row("lru 0.25", 2.0, of_stock=2.75), row("adaptive 0.25", 2.2, of_stock=2.5),
        row("adaptive 0.25, recorded", 2.21),
        *(row(prediction.UNIFORM, 2.0, batch) for batch in (1, 8, 32)),
        *(row(prediction.USELESS, 2.03, batch) for batch in (1, 8)),
        row(prediction.USELESS, 2.1, 32),
    ]  # fmt: skip
    stock, useless, recorder = prediction.verdicts(rows)
    assert stock["values"] == {"lru 0.25": 2.75, "adaptive 0.25": 2.5}
    assert stock["passed"] is True
    assert useless["values"]["batch 32"] == pytest.approx(1.05)
    assert useless["passed"] is False
    assert prediction.verdicts(rows[:-1])[1]["passed"] is None
    assert recorder["passed"] is True
    slow = [row("lru 0.25", 2.0, of_stock=2.4), row("adaptive 0.25, recorded", 2.21)]
    assert [verdict["passed"] for verdict in prediction.verdicts(slow)] == [False, None, None]


def test_another_model_is_not_held_to_what_is_promised_for_qwen3():
    rows = [row("lru 0.25", 2.0, of_stock=1.5, shape="deepseek-v2-lite")]
    assert [verdict["passed"] for verdict in prediction.verdicts(rows)] == [None, None]
