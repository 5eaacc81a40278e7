"""What the suite of the shared budget asks for, concludes and draws."""

import json
from xml.etree import ElementTree

import budget
import budget_plot
import jobs
import pytest
from budget import BUDGET_SHAPES, FLOOR, SPLITS, floor_for, sizes, token_bytes, verdicts
from shapes import SHAPES

from vllm_moe_offload.lending.boundary import Boundary, floor_blocks

REAL, TINY = BUDGET_SHAPES
BLOCK_TOKENS = 16
PHASES = ("chat", "burst", "document", "chat again")


@pytest.fixture(autouse=True)
def known_shapes(monkeypatch):
    for name, shape in BUDGET_SHAPES.items():
        monkeypatch.setitem(SHAPES, name, shape)


def boundary_with(kv_floor: float) -> Boundary:
    """What a worker makes of the suite's sizes and an option, but for the experts there are."""
    shape, size = BUDGET_SHAPES[REAL], sizes(tiny=False)
    block_bytes = BLOCK_TOKENS * token_bytes(shape)
    blocks = size["kv_bytes"] // block_bytes
    sequence = -(-size["max_model_len"] // BLOCK_TOKENS)
    return Boundary(
        num_blocks=blocks,
        block_bytes=block_bytes,
        row_bytes=(shape.expert_bytes,) * shape.num_layers,
        floor_blocks=floor_blocks(blocks, sequence, kv_floor),
        most_slots=9999,
    )


def test_bytes_of_a_token():
    # 16 layers of keys and values, 4 heads of 128, 2 bytes each.
    assert token_bytes(BUDGET_SHAPES[REAL]) == 16 * 2 * 4 * 128 * 2


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_a_floor_leaves_experts_their_share_of_what_the_default_does(share):
    floor = floor_for(share, BUDGET_SHAPES[REAL], sizes(tiny=False))
    assert 0 <= floor <= 1
    most = boundary_with(FLOOR).max_increments
    assert most >= 8, "splits could not be told apart"
    assert abs(boundary_with(floor).max_increments - share * most) <= 1
    if share in (0.0, 1.0):
        assert boundary_with(floor).max_increments == share * most


@pytest.mark.parametrize("name", [REAL, TINY])
def test_a_server_can_take_what_its_phases_ask(name):
    *servers, layout = budget.budget(name, {"staging_mb": 64})
    assert [j["name"] for j in servers] == ["auto", *(f"fixed {share:.2f}" for share in SPLITS)]
    for job in servers:
        size, settings = job["size"], job["settings"]
        room = settings["max_model_len"]
        assert size["document"] + size["answer"] < room
        assert size["turns"] * (size["question"] + size["answer"]) < room
        assert size["prompt"] + 3 * size["short_answer"] < room
        assert size["users"] <= settings["max_num_seqs"]
        # The burst is what experts have to give way to.
        users = size["users"] * size["prompt"] * token_bytes(SHAPES[name])
        assert users > size["kv_bytes"] * (1 - FLOOR) - room * token_bytes(SHAPES[name])
        assert settings["moe_offload"]["staging_mb"] == 64
        assert room <= SHAPES[name].positions
    assert [j["settings"]["moe_offload"]["kv_policy"] for j in servers] == [
        "auto", *["fixed"] * len(SPLITS)
    ]  # fmt: skip
    assert "kv_floor" not in servers[0]["settings"]["moe_offload"], "the default is measured"
    assert layout["kind"] == "layout"


@pytest.mark.parametrize("together", [1, 2, 3, 4, 99])
def test_the_layouts_are_measured_when_all_servers_are_gone(together):
    """They take half of a GPU's memory, whatever they say that they need."""
    memory = jobs.Memory(device=75 << 30, host=108 << 30, servers=together)
    last = jobs.rounds(budget.budget(REAL, {}), memory)[-1]
    assert last[-1]["name"] == "layout"


def phase(configuration, name, seconds, wait=1.0):
    return {
        "case": "phase", "configuration": configuration, "phase": name, "seconds": seconds,
        "waits_s": [wait, 2 * wait],
    }  # fmt: skip


def measured(seconds: dict[str, tuple[float, ...]], wait=None) -> list[dict]:
    """Rows of configurations from their seconds of each phase."""
    wait = wait or {}
    return [
        phase(name, step, value, wait.get(name, 1.0))
        for name, values in seconds.items()
        for step, value in zip(PHASES, values, strict=False)
    ]


def judged(rows) -> list[bool | None]:
    return [verdict["passed"] for verdict in verdicts(rows)]


FIXED = {"fixed 0.00": (9, 2, 9, 9), "fixed 0.50": (4, 4, 4, 4), "fixed 1.00": (1, 9, 1, 1)}


@pytest.mark.parametrize(
    ("auto", "near_best", "beats_each"),
    [((1, 2, 1, 1), True, True), ((1, 2.25, 1, 1), True, True), ((1, 2.26, 1, 1), False, True),
     ((1, 9, 1, 1), False, False), ((2, 8, 1, 1), False, False), ((9, 2, 9, 9), False, False)],
)  # fmt: skip
def test_time_beside_the_splits(auto, near_best, beats_each):
    """The best of each phase together take 5; the best split alone 12."""
    passed = judged(measured({"auto": auto, **FIXED}))
    assert passed[:2] == [near_best, beats_each]


def test_values_beside_the_splits():
    best, each, *_ = verdicts(measured({"auto": (2, 4, 2, 2), **FIXED}))
    assert best["values"] == {"": 2.0}
    assert each["values"] == pytest.approx(
        {"fixed 0.00": 10 / 29, "fixed 0.50": 10 / 16, "fixed 1.00": 10 / 12}
    )


def test_a_split_that_was_not_measured_to_its_end_is_no_split():
    rows = measured({"auto": (1, 2, 1, 1), "fixed 0.00": (0.1, 0.1), "fixed 1.00": (1, 3, 1, 1)})
    best, each, *_ = verdicts(rows)
    assert best["values"] == {"": 5 / 6}
    assert list(each["values"]) == ["fixed 1.00"]


@pytest.mark.parametrize(("auto", "passed"), [(3.0, True), (2.9, True), (3.1, False)])
def test_every_request_waits_beside_a_cache_without_experts(auto, passed):
    waits = {"auto": auto, "fixed 0.00": 3.0, "fixed 1.00": 1.0}
    rows = measured({"auto": (1, 1, 1, 1), **FIXED}, waits)
    assert judged(rows)[2] is passed
    assert list(verdicts(rows)[2]["values"]) == list(PHASES)
    (burst,) = [r for r in rows if (r["configuration"], r["phase"]) == ("auto", "burst")]
    burst["waits_s"][0] = 3.3
    assert judged(rows)[2] is False
    assert verdicts(rows)[2]["values"]["burst"] == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, [True, True, True]),
        ({"seconds": 2.1}, [False, True, True]),
        ({"longest_move_s": 0.006}, [True, False, True]),
        ({"longest_decision_s": 0.006}, [True, True, False]),
        # Not from an idle server, which has lent all.
        ({"increments": 9}, [None, None, None]),
        ({"increments": 0, "most_increments": 0}, [None, None, None]),
    ],
)
def test_recall(changes, passed):
    row = {
        "case": "recall", "seconds": 1.9, "longest_move_s": 0.004, "longest_decision_s": 0.004,
        "increments": 10, "most_increments": 10, **changes,
    }  # fmt: skip
    assert judged([row])[3:6] == passed


def test_every_case_of_the_layout_counts():
    rows = [
        {"case": "layout", "batch": batch, "context": 32_768, "cost": cost}
        for batch, cost in ((1, 1.0), (32, 1.02))
    ]
    assert judged(rows)[6] is True
    assert judged(rows[:1])[6] is None
    assert verdicts(rows)[6]["values"] == {"1 x 32768": 1.0, "32 x 32768": 1.02}
    rows[0]["cost"] = 1.021
    assert judged(rows)[6] is False


@pytest.mark.parametrize("rows", [[], measured({"auto": (1, 1, 1, 1)}), measured(FIXED)])
def test_nothing_is_judged_that_was_not_measured(rows):
    assert judged(rows) == [None] * 7


def samples(configuration="auto", count=6):
    series = [
        {
            "seconds": 0.2 * i, "phase": PHASES[i // 3], "slots": 9 - i, "first_block": 40 + 8 * i,
            "blocks": 100, "used_blocks": 7 * i, "generated": 30 * i, "active": 100 * i,
            "hits": 60 * i,
        }
        for i in range(count)
    ]  # fmt: skip
    return {"case": "samples", "configuration": configuration, "samples": series}


def test_a_plot_holds_what_moved(tmp_path):
    result = {"phases": [samples("fixed 0.00", 2), samples()]}
    path = budget_plot.draw(result, tmp_path / "budget.svg")
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    first = path.read_bytes()
    assert budget_plot.draw(result, path).read_bytes() == first
    for words in (
        "boundary",
        "experts",
        "requests",
        "hit ratio",
        "generated tokens/s",
        *PHASES[:2],
    ):
        assert f"<!-- {words} -->" in first.decode()


@pytest.mark.parametrize("rows", [[], [samples("fixed 1.00")], [samples(count=1)]])
def test_nothing_is_drawn_of_a_server_that_was_not_watched(tmp_path, rows):
    assert budget_plot.draw({"phases": rows}, tmp_path / "budget.svg") is None
    assert list(tmp_path.iterdir()) == []


def test_the_file_grows_with_every_process_and_keeps_what_is_not_asked_for(tmp_path, monkeypatch):
    out, seen = tmp_path / "budget.json", []

    def run_all(asked, _memory):
        for job in asked:
            name, rows = job["name"], []
            if job["kind"] == "phases":
                rows = measured({name: FIXED.get(name, (1, 2, 1, 1))})
                rows.append(samples(name))
            yield {"configuration": name, "exit": 0, "rows": rows, "copy_gb_s": 50.0, "log": ""}
            seen.append(len(json.loads(out.read_text())["processes"]))

    monkeypatch.setattr(jobs, "run_all", run_all)
    monkeypatch.setattr(jobs, "SCRIPT", jobs.SCRIPT)
    # A plot takes a second, and has a test of its own.
    monkeypatch.setattr(budget_plot, "draw", lambda _result, path: path.touch())
    result = budget.measure(out, TINY, {}, {"commit": "abc"})
    assert seen == [1, 2, 3, 4, 5]
    assert result == json.loads(out.read_text())
    assert result["commit"] == "abc"
    assert [v["passed"] for v in result["targets"][:2]] == [True, True]
    assert out.with_suffix(".svg").exists()

    monkeypatch.setitem(FIXED, "fixed 0.50", (1, 1, 1, 1))
    again = budget.measure(out, TINY, {}, {"commit": "def"}, only=["fixed 0.50"])
    assert sorted(p["configuration"] for p in again["processes"]) == sorted(
        p["configuration"] for p in result["processes"]
    )
    assert [v["passed"] for v in again["targets"][:2]] == [False, False]
