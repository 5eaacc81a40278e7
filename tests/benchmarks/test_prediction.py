"""The suite that compares predictors: what it asks for, and how it judges."""

import numpy as np
import prediction
import prediction_server
import pytest
import report
import torch
from shapes import SHAPES
from traces import random_trace

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.predictors.eam import EamPredictor
from vllm_moe_offload.predictors.markov import MarkovPredictor
from vllm_moe_offload.trace import Trace

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


@pytest.mark.parametrize("batch", list(prediction.STEPS))
@pytest.mark.parametrize("tokens", [64, 129, 1000, 10**6, None])
def test_no_token_of_a_trace_is_run_twice(batch, tokens):
    wanted = prediction.STEPS[batch]
    warm_up, steps = prediction.steps_of(batch, tokens)
    assert 1 <= steps <= wanted[1]
    assert 1 <= warm_up <= wanted[0]
    if tokens is None or sum(wanted) <= tokens // batch:
        assert (warm_up, steps) == wanted
    else:
        assert warm_up + steps == tokens // batch


def test_a_trace_that_is_too_short():
    with pytest.raises(SystemExit, match="63 tokens are too few for 32 sequences"):
        prediction.prediction("tiny", {}, "", tokens=63)


def test_stock_takes_the_steps_that_count():
    *stock, ours = prediction.prediction("deepseek-v2-lite", {}, "", tokens=129)
    for job in stock:
        for plan, timed in zip(job["measurements"], ours["measurements"], strict=True):
            assert (plan["batch"], plan["steps"]) == (timed["batch"], timed["steps"])
            assert plan["place"] + plan["warm_up"] == timed["warm_up"]


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


def test_a_predictor_knows_what_it_was_taught():
    # Each expert of a layer is followed by the next one in the layer after it.
    ids_NLK = (np.arange(150)[:, None, None] + np.arange(3)[None, :, None]) % 8
    lessons = Trace(ids_NLK.astype(np.uint8), np.array([0, 20, 150]), 8, "model", "source")
    markov = MarkovPredictor(3, 8, torch.device("cpu"))
    prediction_server.teach(markov, lessons)
    assert markov.tables.tokens == 150
    assert markov.tables.evidence_LEE.argmax(2).tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]] * 2
    eam = EamPredictor(3, 8, 4, torch.device("cpu"))
    prediction_server.teach(eam, lessons)
    assert eam.tables.size == 2  # of 64 tokens each; 20 and 2 are too few
    assert eam.tables.counts_LEN[0].sum(0)[:2].tolist() == [64, 64]


def test_a_result_as_markdown():
    off = "prefetch is off: a layer's computation hides no transfer of an expert"
    rows = [
        row("cpu-offload 0.25", 0.004, tokens_per_second=250.0, server="cpu-offload"),
        row("gate auto 0.25", 0.002, tokens_per_second=500.0, hit_ratio=0.5, bytes=2e7,
            ahead_ratio=0.0, coverage=0.125, of_stock=2.0, said=[off]),
    ]  # fmt: skip
    machine = {"device": "GPU", "processor": "CPU", "torch": "1", "vllm": "2"}
    text = report.markdown({
        "suite": "prediction", "trace": "intent", "learned": "summary", "machine": machine,
        "commit": "abc", "copy_gb_s": [50.0], "targets": prediction.verdicts(rows), "rows": rows,
        "shapes": {"s": {"num_layers": 27}}, "processes": [{"configuration": "p", "exit": 0}],
    })  # fmt: skip
    assert "| cpu-offload 0.25 | 1 | 4.00 | 250.0 |  |" in text
    wanted = "| gate auto 0.25 | 1 | 2.00 | 500.0 | 2.00 x | 0.500 |  | 0.125 | 0.020 | 10.0 |  |"
    assert wanted in text
    assert "- intent in 27 layers; before it predictors knew summary." in text
    assert f"- gate auto 0.25: {off}" in text
