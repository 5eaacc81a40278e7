"""Figures out of made-up rows."""

import json
from xml.etree import ElementTree

import plots
import run
from requirements import set_beside_bounds
from suites import growth

SHAPE = "qwen3-30b-a3b-16"


def result():
    rows = []
    for job in growth(SHAPE, {}):
        for plan in job["measurements"]:
            size = plan.get("batch") or plan["tokens"]
            row = {k: plan[k] for k in ("case", "batch", "tokens") if k in plan}
            row |= {"configuration": job["name"], "server": job["server"], "share": job["share"]}
            moved = 1e8 * size * (1 - job["share"])
            rows.append({**row, "shape": SHAPE, "bytes": moved, "seconds": size / 1e3})
    return {"rows": set_beside_bounds(rows, 50e9)}


def test_three_figures_hold_every_line(tmp_path):
    drawn = plots.draw(result(), tmp_path)
    assert [path.stem for path in drawn] == ["growth-batch", "growth-prompt", "growth-cache"]
    assert all(ElementTree.parse(path).getroot().tag.endswith("svg") for path in drawn)


def test_the_same_rows_give_the_same_file(tmp_path):
    (tmp_path / "again").mkdir()
    first = plots.draw(result(), tmp_path)[0].read_text()
    second = plots.draw(result(), tmp_path / "again")[0].read_text()
    assert first == second


def test_too_few_rows_draw_nothing(tmp_path):
    few = {"rows": [row for row in result()["rows"] if row.get("batch") == 1]}
    assert [path.stem for path in plots.draw(few, tmp_path)] == ["growth-cache"]


def test_the_command_draws_beside_the_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "growth.json").write_text(json.dumps(result()))
    monkeypatch.setattr("sys.argv", ["run.py", "--plot", str(tmp_path / "growth.json")])
    assert run.main() == 0
    assert len(list(tmp_path.glob("*.svg"))) == 3
    assert str(tmp_path / "growth-batch.svg") in capsys.readouterr().out
