import json
import subprocess
import sys

import pytest
from traces import random_trace, recorded

from vllm_moe_offload import cli
from vllm_moe_offload.simulate.policies import POLICIES
from vllm_moe_offload.simulate.replay import replay
from vllm_moe_offload.simulate.sizes import KNOWN, expert_bytes
from vllm_moe_offload.sizes import MIB
from vllm_moe_offload.trace import Trace, load

KEYS = [
    "trace",
    "policy",
    "predictor",
    "cache",
    "batch",
    "hit_ratio",
    "accesses",
    "bytes_per_token",
    "gap_captured",
]


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{name}.npz" for name in ("one", "two")]
    for seed, path in enumerate(paths):
        random_trace(seed, tokens=80).save(path)
    return list(map(str, paths))


def rows_of(capsys, *arguments):
    assert cli.main(["simulate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(capsys, files):
    rows = rows_of(capsys, *files, "--cache", "0.25,0.5")
    assert [list(row) for row in rows] == [KEYS] * (2 * 2 * len(POLICIES))
    trace = load(files[0])
    for row in rows[: 2 * len(POLICIES)]:
        assert row["trace"] == files[0]
        result = replay(trace, row["policy"], [row["cache"]])
        assert row["hit_ratio"] == result.hit_ratio(0)
        assert row["accesses"] == trace.expert_ids.size
        assert (row["predictor"], row["batch"], row["bytes_per_token"]) == ("none", 1, None)
        bounds = {"lru": 0, "belady": 1}
        assert row["gap_captured"] == bounds.get(row["policy"], row["gap_captured"])


def test_directory(capsys, files, tmp_path):
    other = random_trace(2, tokens=9)
    Trace(other.expert_ids, other.sequence_starts, 8, "other", "s").save(tmp_path / "z.npz")
    rows = rows_of(capsys, str(tmp_path), "--cache", "0.5", "--policy", "lru")
    assert [row["trace"] for row in rows] == [str(tmp_path), f"{tmp_path} (1)"]
    sizes = [load(file).expert_ids.size for file in files]
    assert [row["accesses"] for row in rows] == [sum(sizes), other.expert_ids.size]


def test_defaults(capsys, files):
    rows = rows_of(capsys, files[0])
    assert {row["cache"] for row in rows} == {0.125, 0.25, 0.5, 0.75}
    assert {row["policy"] for row in rows} == set(POLICIES)


def test_bytes(capsys, files):
    (row,) = rows_of(capsys, files[0], "--cache", "0.5", "--policy", "lru", "--expert-mb", "2")
    misses = 1 - row["hit_ratio"]
    assert row["bytes_per_token"] == pytest.approx(misses * 3 * 2 * 2 * MIB)


def test_gap_captured(capsys, files):
    lru, ours, bound = rows_of(capsys, files[0], "--cache", "0.5", "--policy", "lru,default,belady")
    gained = ours["hit_ratio"] - lru["hit_ratio"]
    assert ours["gap_captured"] == pytest.approx(gained / (bound["hit_ratio"] - lru["hit_ratio"]))
    assert ours["policy"] == "default"


def test_no_gap_to_capture(capsys, files):
    (row,) = rows_of(capsys, files[0], "--cache", "1", "--policy", "lru")
    assert row["gap_captured"] is None


def test_batch(capsys, files):
    (row,) = rows_of(capsys, files[0], "--cache", "0.5", "--policy", "lru", "--batch", "3")
    assert list(row) == [*KEYS, "unique_hit_ratio"]
    result = replay(load(files[0]), "lru", [0.5], batch=3)
    assert row["batch"] == 3
    assert row["hit_ratio"] == result.hit_ratio(0)
    assert row["unique_hit_ratio"] == result.load_hit_ratio(0)


def test_predictors(capsys, files):
    rows = rows_of(
        capsys, *files, "--cache", "0.5", "--policy", "lru", "--predictor", "none,markov,eam",
        "--expert-mb", "2",
    )  # fmt: skip
    assert [row["predictor"] for row in rows] == ["none", "markov", "eam"] * 2
    none, markov, eam = rows[:3]
    for row in (markov, eam):
        assert row["hit_ratio"] == none["hit_ratio"], "without a budget nothing is prefetched"
        assert 0 < row["coverage_k"] < row["coverage_2k"] <= 1
        assert row["precision"] == pytest.approx(row["coverage_k"], abs=0.05)
        assert row["wasted_bytes_per_token"] > 0
    assert "coverage_k" not in none


def test_prefetch(capsys, files):
    options = ("--cache", "0.5", "--policy", "lru,belady", "--predictor", "none,markov")
    rows = rows_of(capsys, *files, *options, "--expert-mb", "2", "--prefetch-mb", "5")
    assert [(row["policy"], row["predictor"]) for row in rows[:3]] == [
        ("lru", "none"), ("belady", "none"), ("lru", "markov"),
    ]  # fmt: skip
    plain, _, fetched = rows[:3]
    assert fetched["bytes_per_token"] > plain["bytes_per_token"]
    assert 0 < fetched["wasted_bytes_per_token"] < fetched["bytes_per_token"]


@pytest.mark.parametrize("batch", [(), ("--batch", "4")])
def test_tables(capsys, files, batch):
    options = ("--predictor", "markov", "--expert-mb", "1", "--policy", "lru,adaptive,belady")
    assert cli.main(["simulate", *files, *options, *batch]) == 0
    text = capsys.readouterr().out
    for part in (*files, "adaptive*", "cache 0.125", "100%", "coverage at k", "engine's default"):
        assert part in text
    assert ("unique loads" in text) == bool(batch)


@pytest.mark.parametrize(("budget", "shown"), [("0", 1), ("5", 3)])
def test_policies_are_shown_once_unless_something_is_prefetched(capsys, files, budget, shown):
    options = ("--predictor", "none,markov,eam", "--expert-mb", "2", "--prefetch-mb", budget)
    assert cli.main(["simulate", files[0], *options, "--policy", "lru,belady"]) == 0
    text = capsys.readouterr().out
    assert text.count("cache 0.125") == shown
    assert text.count("coverage at k") == 1
    assert ("predictor markov" in text) == (shown > 1)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--policy", "fifo"], "--policy = fifo"),
        (["--policy", ""], "--policy"),
        (["--predictor", "gate"], "--predictor = gate"),
        (["--predictor", "x"], "--predictor = x"),
        (["--cache", "1.5"], "--cache = 1.5"),
        (["--cache", "a"], "--cache = a"),
        (["--cache", "nan"], "--cache = nan"),
        (["--batch", "0"], "--batch = 0"),
        (["--expert-mb", "0"], "--expert-mb = 0"),
        (["--prefetch-mb", "-1"], "--prefetch-mb = -1"),
        (["--prefetch-mb", "9"], "Give --expert-mb too"),
    ],
)
def test_refusals(capsys, files, options, problem):
    assert cli.main(["simulate", files[0], *options]) == 2
    captured = capsys.readouterr()
    assert problem in captured.err
    assert captured.out == ""


def test_no_trace(capsys, tmp_path):
    assert cli.main(["simulate", str(tmp_path / "no.npz")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_expert_sizes():
    assert expert_bytes("Qwen3-30B-A3B-Instruct", None) == 3 * 2048 * 768 * 2
    assert expert_bytes("openai/gpt-oss-20b", None) == 3 * 2880 * 2880 * 17 // 32
    assert expert_bytes("Qwen3-30B-A3B", 1.5) == 3 * MIB // 2
    assert expert_bytes("something else", None) is None


@pytest.mark.parametrize(
    "name",
    ["Qwen/Qwen3-30B-A3B-FP8", "Qwen/Qwen3-30B-A3B-GPTQ-Int4", "Mixtral-8x7B-Instruct-AWQ",
     "Qwen3-30B-A3B-quantized.w4a16", "Qwen3-30B-A3B-NVFP4", "unsloth/gpt-oss-20b-BF16",
     "Qwen3-30B-A3B-4bit"],
)  # fmt: skip
def test_size_of_other_bits_is_not_that_of_the_model(name):
    assert expert_bytes(name, None) is None
    assert expert_bytes(name, 1.0) == MIB
    assert all(name == name.lower() for name in KNOWN)


def test_known_model(capsys, tmp_path):
    trace = random_trace(0)
    named = Trace(trace.expert_ids, trace.sequence_starts, 8, "OLMoE-1B-7B-0924", "here")
    named.save(tmp_path / "a.npz")
    (row,) = rows_of(capsys, str(tmp_path / "a.npz"), "--cache", "0", "--policy", "lru")
    assert row["bytes_per_token"] == 3 * 2 * 3 * 2048 * 1024 * 2


def test_neither_torch_nor_vllm_is_loaded(files):
    code = (
        "import sys; from vllm_moe_offload import cli, trace_report; "
        f"cli.main(['simulate', {files[0]!r}, '--json', '--predictor', 'eam']); "
        "print({'torch', 'vllm', 'triton', 'numba'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"


@pytest.mark.traces
def test_recorded(capsys):
    paths = map(str, recorded())
    rows = rows_of(capsys, *paths, "--cache", "0.25", "--policy", "lru,belady")
    ratios = {row["policy"]: row["hit_ratio"] for row in rows if "intent" in row["trace"]}
    assert ratios["lru"] == pytest.approx(0.506, abs=0.002)
    assert ratios["belady"] == pytest.approx(0.715, abs=0.002)
    assert all(row["bytes_per_token"] > 0 for row in rows)
