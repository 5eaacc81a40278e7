"""The table of targets: what it covers, what it judges and how."""

import json

import pytest
import report
import run
from requirements import FASTER, label, requirements, set_beside_bounds, verdicts
from suites import engine

CHUNK = 8192
RATE = 50e9
SHAPE = "qwen3-30b-a3b-16"
RESIDENT, MOVED = 0.01, 5e8
"""The bytes take as long as the resident server."""


def about(job):
    return {"configuration": job["name"]} | {k: job[k] for k in ("server", "share", "shape")}


def rows_of(job, seconds):
    rows = []
    for plan in job["measurements"]:
        kept = {k: plan[k] for k in ("case", "batch", "tokens", "confined") if k in plan}
        rows.append({**about(job), **kept, "seconds": seconds(job, plan)})
        if job["server"] == "plugin":
            rows[-1]["bytes"] = 0 if job["share"] == 1.0 or "confined" in plan else MOVED
    return rows


def perfect(job, plan):
    """Seconds that are exactly on every bound."""
    if job["server"] == "resolve":
        return 8e-6
    if job["server"] == "cpu-offload":
        return 1.0
    on_sum = job["server"] == "plugin" and plan.get("batch", 999) <= 8
    moves = job["share"] < 1.0 and "confined" not in plan
    return RESIDENT + (MOVED / RATE if on_sum and moves else 0)


def measured(seconds=perfect):
    rows = [row for job in engine(SHAPE, {}) for row in rows_of(job, seconds)]
    return set_beside_bounds(rows, RATE)


def outcome(rows, text):
    (found,) = [v for v in verdicts(rows, CHUNK) if v["case"].startswith(text)]
    return found


def test_the_suite_measures_every_case_of_the_table():
    table = verdicts(measured(), CHUNK)
    assert [v["passed"] for v in table] == [True] * len(table)
    assert len(table) == len(requirements(CHUNK)) + 1
    for requirement, verdict in zip(requirements(CHUNK), table, strict=False):
        assert len(verdict["values"]) == requirement.cases


def test_on_the_bound_is_one():
    for verdict in verdicts(measured(), CHUNK):
        if verdict["case"] != FASTER and "us" not in verdict["target"]:
            assert list(verdict["values"].values()) == pytest.approx([1] * len(verdict["values"]))


@pytest.mark.parametrize(
    ("text", "slower", "cases"),
    [
        ("100 % in slots, decode", 1.06, {"share": 1.0, "case": "decode"}),
        ("50 % in slots, routing", 1.13, {"share": 0.5, "confined": 64}),
        ("100 % in slots, 8192", 1.11, {"share": 1.0, "case": "prefill"}),
        ("25 % and 50 % in slots, decode batch 1", 1 / 0.92, {"share": 0.25, "batch": 8}),
        ("25 % and 50 %, decode batch 32", 1 / 0.87, {"share": 0.25, "batch": 128}),
        ("25 % and 50 %, 8192", 1 / 0.94, {"share": 0.5, "tokens": 8192}),
        ("0, 25 and 50 % in slots, 32768", 1 / 0.94, {"share": 0.0, "tokens": 32768}),
    ],
)
def test_a_little_too_slow_fails_one_row_of_the_table(text, slower, cases):
    def seconds(job, plan):
        asked = {**plan, "share": job["share"]}
        hit = job["server"] == "plugin" and all(asked.get(k) == v for k, v in cases.items())
        return perfect(job, plan) * (slower if hit else 1)

    table = verdicts(measured(seconds), CHUNK)
    assert [v["case"].startswith(text) for v in table if v["passed"] is False] == [True]


def test_resolve_has_limits_in_microseconds():
    def seconds(job, plan):
        return 8.1e-6 if job["server"] == "resolve" else perfect(job, plan)

    rows = measured(seconds)
    assert outcome(rows, "resolve + gather, all hits, batch 1")["passed"] is False
    assert outcome(rows, "resolve + gather, all hits, batch 32")["passed"] is True


def test_slower_than_stock_offload_fails():
    def seconds(job, plan):
        slow = job["server"] == "plugin" and job["share"] == 0.0 and plan.get("tokens") == 32768
        return 1.5 if slow else perfect(job, plan)

    found = outcome(measured(seconds), FASTER)
    assert found["passed"] is False
    assert found["values"]["0% prefill 32768"] == pytest.approx(1 / 1.5)


def test_what_was_not_measured_neither_passes_nor_fails():
    rows = [row for row in measured() if row.get("batch") != 32 and row["server"] != "resolve"]
    assert outcome(rows, "100 % in slots, decode")["passed"] is None
    assert outcome(rows, "resolve + gather, all hits, batch 1")["passed"] is None
    without_stock = set_beside_bounds([r for r in rows if r["server"] != "cpu-offload"], RATE)
    assert outcome(without_stock, FASTER)["passed"] is None


def test_confined_routing_is_compared_with_confined_routing():
    def confined(rows):
        (row,) = [
            r for r in rows if r["server"] == "plugin" and label(r) == "50% decode 1 confined"
        ]
        return row["to_resident"]

    def seconds(job, plan):
        both = job["server"] == "resident" and "confined" in plan
        return perfect(job, plan) * (0.5 if both else 1)

    assert confined(measured(seconds)) == pytest.approx(2 * confined(measured()))


def test_a_failed_server_leaves_its_rows_unjudged():
    rows = [row for row in measured() if row["server"] != "resident"]
    bare = [{k: v for k, v in row.items() if k in ("bytes", "seconds", "case", "batch", "tokens",
            "confined", "share", "server", "shape", "configuration")} for row in rows]  # fmt: skip
    table = verdicts(set_beside_bounds(bare, RATE), CHUNK)
    assert {v["passed"] for v in table if "t_res" in v["target"]} == {None}


def test_file_of_another_program_is_not_rendered(tmp_path, monkeypatch):
    file = tmp_path / "peers.json"
    file.write_text('{"machine": {}, "rows": []}')
    monkeypatch.setattr("sys.argv", ["run.py", "--render", str(file)])
    with pytest.raises(SystemExit, match="it holds no results of this program's suites"):
        run.main()


def test_results_render_as_markdown(tmp_path):
    rows = measured()
    result = {
        "machine": {"device": "GPU", "processor": "CPU", "torch": "2", "vllm": "0"},
        "commit": "c", "copy_gb_s": [50.0, 49.0], "rows": rows,
        "targets": verdicts(rows, CHUNK),
        "processes": [{"configuration": "plugin 0.5", "exit": 1, "log": "boom"}],
    }  # fmt: skip
    text = report.markdown(json.loads(json.dumps(result)))
    assert "| 100 % in slots, 8192-token prefill | t / t_res at most 1.10 |" in text
    assert text.count("| pass |") == len(result["targets"])
    assert "Pinned copies of 9 MiB: 50.0 GB/s." in text
    assert "Failed: plugin 0.5: 1" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {5, 12}
