"""Measuring everything: command lines that are understood, GPUs that share, a limit that holds."""

import importlib.util
import sys
import time
from pathlib import Path

import everything
import pytest
from everything import MEASUREMENTS, Measurement, command_of, measure, parse, places

ROOT = Path(__file__).parents[2]


def parsed(*words):
    return parse(["--out", "results", "--traces", "traces", *words])


def script(path):
    spec = importlib.util.spec_from_file_location(f"measured_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("measurement", MEASUREMENTS, ids=lambda m: m.name)
@pytest.mark.parametrize("words", [(), ("--commit", "0123abc", "--limit-s", "300")])
def test_every_command_is_understood(measurement, words):
    args = parsed(*words)
    _, *command = command_of(measurement, args, args.limit_s, 4)
    assert not any("{" in word for word in command)
    if command[0] == "-m":
        assert all((ROOT / path).exists() for path in command[3:])
        return
    asked = script(ROOT / command[0]).parse(command[1:])
    assert asked.out.parent == Path("results")
    assert asked.commit == args.commit


def test_names_tell_measurements_apart():
    assert len({measurement.name for measurement in MEASUREMENTS}) == len(MEASUREMENTS)
    files = [word for m in MEASUREMENTS for word in m.words.split() if word.startswith("{out}")]
    assert len(set(files)) == len(files)


def test_cores_are_split_evenly():
    assert places([0, 3], [4, 5, 6, 7, 8]) == [(0, [4, 5]), (3, [6, 7])]
    assert places([1, 1], [4, 5]) == [(1, [4]), (1, [5])]
    assert places([0, 1], [4]) == [(0, [4]), (1, [4])]


def test_without_traces(capsys):
    args = parse(["--out", "results", "--only", "trace", "engine"])
    assert [m.name for m in everything.asked_for(args)] == ["engine"]
    assert "--traces" in capsys.readouterr().out


def test_measurements_run_side_by_side_until_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(everything, "GRACE_S", 1.0)
    args = parse(["--out", str(tmp_path), "--limit-s", "10", "--gpus", "0", "1"])
    tell = "-c import~os,sys;print(os.environ['CUDA_VISIBLE_DEVICES']);sys.exit("
    waiting = [
        Measurement("first", tell + "0)"),
        Measurement("second", tell + "3)"),
        Measurement("endless", "-c import~time;time.sleep(60)"),
        Measurement("other", "-c import~time;time.sleep(60)"),
        Measurement("late", tell + "0)"),
    ]
    args.logs.mkdir()
    where = places(args.gpus, sorted(everything.os.sched_getaffinity(0)))
    start = time.monotonic()
    assert measure(waiting, args, where) == {
        "first": "done",
        "second": "failed (3)",
        "endless": "failed (-15)",
        "other": "failed (-15)",
        "late": "not begun",
    }
    assert time.monotonic() - start < 50
    logs = {(tmp_path / "logs" / f"{name}.log").read_text() for name in ("first", "second")}
    assert logs == {"0\n", "1\n"}
