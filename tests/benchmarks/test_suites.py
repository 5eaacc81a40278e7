"""What the suites ask for, and the processes that do it."""

import jobs
import pytest
import run
from shapes import SHAPES
from suites import GIB, SUITES, decode, job, prefill, profiled, united

SHAPE = "qwen3-30b-a3b-16"


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("shape", [SHAPE, "tiny"])
def test_a_server_can_take_what_it_is_asked(suite, shape):
    asked = SUITES[suite](shape, {})
    assert len({j["name"] for j in asked}) == len(asked)
    for j in asked:
        settings = j["settings"]
        for plan in j["measurements"]:
            assert plan.get("batch", 0) <= settings["max_num_seqs"]
            assert plan.get("tokens", 0) < settings["max_model_len"]
        sizes = settings.get("compilation_config", {}).get("cudagraph_capture_sizes")
        decodes = {p["batch"] for p in j["measurements"] if p["case"] == "decode"}
        assert sizes is None or set(sizes) >= decodes


def test_stock_vllm_offloads_whole_layers():
    per_layer = SHAPES[SHAPE].pool_bytes / SHAPES[SHAPE].moe_layers
    offload = [j for j in SUITES["engine"](SHAPE, {}) if j["server"] == "cpu-offload"]
    layers = [j["settings"]["cpu_offload_gb"] * GIB / per_layer for j in offload]
    assert layers == [8, 12, 16]


def test_options_reach_every_server_with_the_plugin():
    asked = SUITES["engine"](SHAPE, {"staging_mb": 64})
    options = [j["settings"]["moe_offload"] for j in asked if j["server"] == "plugin"]
    assert {o["staging_mb"] for o in options} == {64}


def test_suites_share_their_servers():
    one = [job("a", "resident", 1.0, SHAPE, [decode(1, 24), prefill(8192, 3)])]
    two = [
        job("a", "resident", 1.0, SHAPE, [decode(1, 6), decode(256, 6), prefill(32_768, 1)]),
        job("b", "resident", 1.0, SHAPE, [decode(2, 6)]),
    ]
    first, second = united(one + two)
    assert second["name"] == "b"
    assert first["measurements"] == [
        decode(1, 24), prefill(8192, 3), decode(256, 6), prefill(32_768, 1)
    ]  # fmt: skip
    assert first["settings"]["max_num_seqs"] == 256
    assert first["settings"]["max_model_len"] > 32_768
    assert first["settings"]["compilation_config"] == {"cudagraph_capture_sizes": [1, 256]}


def test_all_suites_together_keep_the_settings_of_each():
    together = united([j for suite in SUITES.values() for j in suite(SHAPE, {"x": 1})])
    (half,) = [j for j in together if j["name"] == "plugin 0.5"]
    assert half["settings"]["moe_offload"]["cache_fraction"] == 0.5
    (resolve,) = [j for j in together if j["kind"] == "resolve"]
    assert resolve["measurements"][0] == {"case": "resolve", "batch": 1}


def test_a_process_that_dies_leaves_its_log(monkeypatch):
    monkeypatch.setattr(jobs, "SCRIPT", "no such script")
    broken = job("broken", "resident", 1.0, "tiny", [decode(1, 1)])
    first, second = jobs.run_all([broken, {**broken, "name": "again"}])
    assert (first["exit"], first["configuration"], first["rows"]) == (2, "broken", [])
    assert "no such script" in first["log"]
    assert second["configuration"] == "again"


def test_a_process_that_hangs_is_stopped(monkeypatch, tmp_path):
    script = tmp_path / "hang.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "sys.stdin.readline()\n"
        'pathlib.Path(sys.argv[2]).write_text(\'{"rows": [{"case": "start"}]}\')\n'
        "pathlib.Path(sys.argv[4]).touch()\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(jobs, "SCRIPT", str(script))
    (result,) = jobs.run_all([job("slow", "resident", 1.0, "tiny", [decode(1, 1)])], time_limit=9)
    assert result["exit"] == "stopped after 9 s"
    assert [row["configuration"] for row in result["rows"]] == ["slow"]


def test_options_of_the_plugin_are_json_where_they_can_be():
    parsed = run.parse(["--list", "--option", "staging_mb=64", "layers=0-3", "allow_dense=true"])
    assert parsed.option == {"staging_mb": 64, "layers": "0-3", "allow_dense": True}


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--option", "novalue"]])
def test_a_wrong_command_line_is_refused(arguments):
    with pytest.raises(SystemExit):
        run.parse(arguments)


def test_the_profiled_server_is_the_suites_server():
    (half,) = [j for j in SUITES["engine"](SHAPE, {}) if j["name"] == "plugin 0.5"]
    alone = profiled(half, "decode", 8, "out.txt")
    assert alone["settings"]["moe_offload"] == half["settings"]["moe_offload"]
    assert [(p["case"], p["batch"]) for p in alone["measurements"]] == [("decode", 8)]
    assert profiled(half, "prefill", 32_768, "out.txt")["settings"]["max_model_len"] > 32_768


def test_a_model_of_latent_attention_has_a_layer_less():
    shape = SHAPES["deepseek-v2-lite"]
    assert shape.moe_layers == 26
    assert shape.expert_bytes == 3 * 2048 * 1408 * 2


def test_a_process_that_never_gets_ready_is_stopped(monkeypatch, tmp_path):
    script = tmp_path / "hang.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(jobs, "SCRIPT", str(script))
    (result,) = jobs.run_all([job("slow", "resident", 1.0, "tiny", [decode(1, 1)])], time_limit=1)
    assert result["exit"] == -9


def test_one_is_measured_while_the_others_of_its_round_wait(monkeypatch, tmp_path):
    diary = tmp_path / "diary"
    script = tmp_path / "server.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "name = json.loads(sys.stdin.readline())['name']\n"
        f"diary = open({str(diary)!r}, 'a', buffering=1)\n"
        "diary.write(f'{name} starts\\n')\n"
        "pathlib.Path(sys.argv[4]).touch()\n"
        "sys.stdin.readline()\n"
        "diary.write(f'{name} measures\\n')\n"
        "time.sleep(0.2)\n"
        "diary.write(f'{name} ends\\n')\n"
    )
    monkeypatch.setattr(jobs, "SCRIPT", str(script))
    monkeypatch.setattr(jobs, "needs", lambda job: (1, 1))
    asked = [job(name, "resident", 1.0, "tiny", [decode(1, 1)]) for name in "abc"]
    assert [r["exit"] for r in jobs.run_all(asked, jobs.Memory(2, 9))] == [0, 0, 0]
    lines = diary.read_text().splitlines()
    assert sorted(lines[:2]) == ["a starts", "b starts"]
    assert lines[2:] == ["a measures", "a ends", "b measures", "b ends", "c starts",
                         "c measures", "c ends"]  # fmt: skip


def test_rounds_fit():
    memory = jobs.Memory(device=75 * GIB, host=108 * GIB)
    asked = SUITES["engine"](SHAPE, {})
    found = jobs.rounds(asked, memory)
    assert sorted(j["name"] for part in found for j in part) == sorted(j["name"] for j in asked)
    assert len(found) < len(asked) / 2
    for part in found:
        device, host = map(sum, zip(*map(jobs.needs, part), strict=True))
        assert device <= memory.device
        assert host <= memory.host
    assert all(len(r) <= 2 for r in jobs.rounds(asked, jobs.Memory(1 << 60, 1 << 60, 2)))
    assert len(jobs.rounds(asked, jobs.Memory(1 << 60, 1 << 60))) == 1
    assert jobs.rounds(asked, jobs.Memory(0, 0)) == [[j] for j in asked]


@pytest.mark.parametrize("suite", ["engine", "quant", "budget"])
def test_a_configuration_that_is_not_there_is_named(suite, tmp_path, monkeypatch):
    words = ["run.py", "--suite", suite, "--shape", "tiny", "--only", "nothing"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path / "result.json")])
    with pytest.raises(SystemExit, match="no nothing here"):
        run.main()
