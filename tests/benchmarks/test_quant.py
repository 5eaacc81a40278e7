"""The suite of quantised experts: what it asks for, how engines take turns, and its verdicts."""

import json
from types import SimpleNamespace

import jobs
import pytest
import quant
import quant_server
from quant_shapes import QUANT_SHAPES
from shapes import SHAPES
from suites import GIB

from vllm_moe_offload.config import MoeOffloadConfig

FP8, W4A16, MXFP4 = quant.names()


@pytest.fixture(autouse=True)
def shapes(monkeypatch):
    for name, shape in QUANT_SHAPES.items():
        monkeypatch.setitem(SHAPES, name, shape)


def every_job(options=None, gpus=1):
    return [job for n, name in enumerate(quant.names())
            for job in quant.quant(name, options or {}, n % gpus)]  # fmt: skip


def test_formats_in_their_order_and_the_plugin_after_stock_vllm():
    assert [FP8.split("-")[-1], W4A16.split("-")[-1], MXFP4.split("-")[-1]] == [
        "fp8", "w4a16", "mxfp4",
    ]  # fmt: skip
    asked = every_job()
    assert [job["shape"] for job in asked] == [FP8] * 3 + [W4A16] * 3 + [MXFP4] * 3
    assert [job["server"] for job in asked] == ["resident", "resident", "plugin"] * 3


@pytest.mark.parametrize("name", QUANT_SHAPES)
def test_a_server_can_take_what_it_is_asked(name, tmp_path):
    for job in quant.quant(name, {"staging_mb": 64}):
        settings = job["settings"]
        for plan in job["measurements"]:
            assert plan.get("batch", 0) <= settings["max_num_seqs"]
            assert plan.get("tokens", 0) < settings["max_model_len"]
        for engine in job.get("engines", []):
            assert MoeOffloadConfig.parse(engine["options"]).cache_fraction == engine["share"]
            assert engine["options"]["staging_mb"] == 64
    *_, ours = quant.quant(name, {})
    assert [engine["share"] for engine in ours["engines"]] == [1.0, 0.25]
    assert ours["engines"][0]["options"] == ours["settings"]["moe_offload"]
    config = json.loads((QUANT_SHAPES[name].write(tmp_path) / "config.json").read_text())
    assert config["quantization_config"] == QUANT_SHAPES[name].quantization


def test_some_configurations_alone():
    asked = every_job()
    assert quant.only(asked, None) == asked
    assert quant.only(asked, [W4A16]) == asked[3:6]
    (stock, ours) = quant.only(asked, [f"{FP8}, stock triton", f"{MXFP4}, plugin 0.25"])
    assert stock["name"] == f"{FP8}, stock triton"
    assert [engine["name"] for engine in ours["engines"]] == [f"{MXFP4}, plugin 0.25"]
    assert quant.configurations([ours]) == [f"{MXFP4}, plugin 0.25"]


def test_all_servers_start_at_once_on_two_gpus():
    memory = jobs.Memory(device=130 * GIB, host=200 * GIB)
    asked = every_job(gpus=2)
    assert jobs.rounds(asked, memory) == [asked]
    assert {job["shape"]: job["gpu"] for job in asked} == {FP8: 0, W4A16: 1, MXFP4: 0}
    assert len(jobs.rounds(every_job(), memory)) == 2


def test_a_process_sees_one_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert jobs._seeing(None) is None
    assert jobs._seeing(1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert jobs._seeing(1)["CUDA_VISIBLE_DEVICES"] == "5"


class Talk:
    def __init__(self):
        self.rows, self.ended = [], False

    def note(self, row):
        self.rows.append(row)

    def wait_for_turn(self):
        assert self.rows == [{"case": "start"}]

    def end(self):
        self.ended = True


@pytest.fixture
def engines(monkeypatch):
    """Runs a job with a server that is made up, and returns the options of its engines."""
    built = []
    server = SimpleNamespace(
        worker=lambda: "worker", stats=lambda: {"pool_bytes": 200, "experts_in_pool": 4}
    )

    class Exchange:
        def __init__(self, worker):
            assert worker == "worker"

        def build(self, options):
            built.append(options)
            if "broken" in options:
                raise RuntimeError("no room")

    def started(job, _folder, talk):
        built.append(job["settings"]["moe_offload"])
        talk.note({"case": "start"})
        return server, "strategy"

    def measured(_server, _strategy, job):
        yield {"case": "decode", "batch": 1, "seconds": job["share"]}

    monkeypatch.setattr(quant_server, "Exchange", Exchange)
    monkeypatch.setattr(quant_server.timed_server, "started", started)
    monkeypatch.setattr(quant_server.timed_server, "measured", measured)
    return built


def test_engines_in_turn_over_one_server(engines, tmp_path):
    *_, ours = quant.quant(FP8, {})
    talk = Talk()
    quant_server.time_shares(ours, tmp_path, talk)
    assert [options["cache_fraction"] for options in engines] == [1.0, 0.25]
    rows = talk.rows[1:]
    assert [row["configuration"] for row in rows] == [f"{FP8}, plugin {s}" for s in (1.0, 0.25)]
    assert [row["share"] for row in rows] == [row["seconds"] for row in rows] == [1.0, 0.25]
    assert {row["row_bytes"] for row in rows} == {50}


def test_one_engine_alone(engines, tmp_path):
    *_, ours = quant.only(quant.quant(FP8, {}), [f"{FP8}, plugin 0.25"])
    talk = Talk()
    quant_server.time_shares(ours, tmp_path, talk)
    assert [options["cache_fraction"] for options in engines] == [1.0, 0.25]
    assert [row["share"] for row in talk.rows[1:]] == [0.25]


def test_an_engine_that_fails_leaves_the_others(engines, tmp_path, capsys):
    *_, ours = quant.quant(FP8, {})
    broken = {"name": "broken", "share": 0.5, "options": {"broken": True}}
    ours["engines"] = [ours["engines"][0], broken, ours["engines"][1]]
    talk = Talk()
    with pytest.raises(SystemExit, match="failed: broken"):
        quant_server.time_shares(ours, tmp_path, talk)
    assert talk.ended
    assert [row["share"] for row in talk.rows[1:]] == [1.0, 0.25]
    assert "no room" in capsys.readouterr().err


def row(server, seconds, *, share=1.0, batch=1, **more):
    about = {"configuration": f"{FP8}, {server} {share}", "server": server, "share": share}
    case = {"shape": FP8, "case": "decode", "batch": batch, "seconds": seconds}
    return {**about, **case, **more}


def test_the_plugin_beside_the_fastest_backend_of_the_case():
    size = QUANT_SHAPES[FP8].expert_bytes
    rows = [
        row("resident", 0.004), row("resident", 0.002), row("resident", 0.003, batch=8),
        row("resident", 0.005, batch=8), row("resident", 0.006, batch=32),
        *(row("plugin", seconds, batch=batch, bytes=0.0, row_bytes=size + 4000)
          for batch, seconds in ((1, 0.0021), (8, 0.0033), (32, 0.0066))),
        row("plugin", 0.012, share=0.25, bytes=5e8, row_bytes=size + 4000),
    ]  # fmt: skip
    result = quant.judged(rows, [{"copy_gb_s": 50.0}, {"copy_gb_s": None}])
    assert result["all_rows"] == rows
    first, quarter, large, prefill, padding = result["targets"]
    assert list(first["values"].values()) == pytest.approx([1.05, 1.1, 1.1])
    assert quarter["values"] == {"25% decode 1": pytest.approx(1.0)}
    assert (large["values"], prefill["passed"]) == ({}, None)
    (ratio,) = padding["values"].values()
    assert 1.0 < ratio < 1.001
    assert padding["passed"] is True
    slow = [*rows, row("plugin", 0.1, batch=32, bytes=0.0, row_bytes=2 * size)]
    failed = [target["passed"] for target in quant.judged(slow, [])["targets"]]
    assert (failed[0], failed[-1]) == (False, False)


SERVER = """
import json, pathlib, sys
job = json.loads(sys.stdin.readline())
pathlib.Path(sys.argv[4]).touch()
sys.stdin.readline()
rows = [{"case": "decode", "batch": 1, "seconds": 1.0, "configuration": e["name"],
         "share": e["share"]} for e in job.get("engines", [job])]
pathlib.Path(sys.argv[2]).write_text(json.dumps({"rows": rows, "copy_gb_s": 50.0}))
"""


def test_the_file_grows_with_each_process_and_keeps_what_is_not_measured_again(
    monkeypatch, tmp_path
):
    script, out = tmp_path / "server.py", tmp_path / "quant.json"
    script.write_text(SERVER)
    monkeypatch.setattr(quant, "SERVER", script)
    monkeypatch.setattr(jobs, "SCRIPT", "changed by the suite")
    seen = []
    monkeypatch.setattr(
        quant, "print",
        lambda *_, **__: seen.append(len(json.loads(out.read_text())["all_rows"])
                                     if out.exists() else 0),
        raising=False,
    )  # fmt: skip
    asked = quant.quant("tiny-fp8", {})
    result = quant.measure(out, asked, {"commit": "one"})
    assert seen == [0, 1]
    shares = [(row["configuration"], row["share"]) for row in result["all_rows"]]
    assert shares == [("tiny-fp8, stock auto", 1.0), ("tiny-fp8, plugin 1.0", 1.0),
                      ("tiny-fp8, plugin 0.25", 0.25)]  # fmt: skip
    again = quant.only(asked, ["tiny-fp8, plugin 0.25"])
    result = quant.measure(out, again, {"commit": "two"}, fresh=False)
    assert [row["share"] for row in result["all_rows"]] == [1.0, 1.0, 0.25]
    assert len(result["processes"]) == 2
    assert json.loads(out.read_text())["commit"] == "two"
