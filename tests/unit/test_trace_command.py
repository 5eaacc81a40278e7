import builtins

import numpy as np
import pytest
from traces import random_trace, recorded, trace_of

from vllm_moe_offload import cli
from vllm_moe_offload.trace import Trace
from vllm_moe_offload.trace_report import expert_shares, layer_entropy, reuse


def test_shares_and_entropy():
    trace = trace_of([[[0, 1], [0, 1]], [[2, 3], [0, 1]]], 4)
    shares = expert_shares(trace)
    assert shares.tolist() == [[0.25] * 4, [0.5, 0.5, 0, 0]]
    assert layer_entropy(shares).tolist() == [2, 1]


def test_entropy_of_one_expert_is_zero():
    assert layer_entropy(np.array([[1.0, 0.0]])).tolist() == [0]


def test_reuse_against_brute_force():
    trace = random_trace(0, tokens=50)
    distances, firsts = [], 0
    for layer in range(trace.num_layers):
        last = {}
        for token, ids in enumerate(trace.expert_ids[:, layer].tolist()):
            for expert in ids:
                firsts += expert not in last
                distances += [token - last[expert]] if expert in last else []
                last[expert] = token
    found = reuse(trace)
    assert found.first == pytest.approx(firsts / trace.expert_ids.size)
    for share, tokens in found.quantiles.items():
        assert tokens == pytest.approx(np.quantile(distances, share))


def test_reuse_of_nothing():
    assert reuse(trace_of([[[0]]], 2)).quantiles == {}


def test_show(capsys, tmp_path):
    trace = random_trace(0, tokens=50, layers=3, experts=8)
    decode = np.arange(50) < 20
    path = tmp_path / "a.npz"
    Trace(trace.expert_ids, trace.sequence_starts, 8, "a [model]", "here", decode).save(path)
    assert cli.main(["trace", "show", str(path)]) == 0
    text = capsys.readouterr().out
    for part in (str(path), "a [model]", "here", "3 of 8 experts, 2 a token", "decode steps: 20",
                 "entropy", "hot experts", "reuse distance"):  # fmt: skip
        assert part in text


def test_show_directory(capsys, tmp_path):
    for number in range(2):
        random_trace(number, tokens=30).save(tmp_path / f"{number}.npz")
    other = random_trace(2, tokens=7)
    Trace(other.expert_ids, other.sequence_starts, 8, "other", "s").save(tmp_path / "2.npz")
    assert cli.main(["trace", "show", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.count(str(tmp_path)) == 2
    assert "tokens     60," in text
    assert "tokens     7," in text
    assert cli.main(["trace", "show", str(tmp_path), "--plot", str(tmp_path / "a.png")]) == 2
    assert "holds 2 recordings. Give one file" in capsys.readouterr().err


def test_show_empty(capsys, tmp_path):
    path = tmp_path / "a.npz"
    trace_of(np.zeros((0, 2, 1)), 4, []).save(path)
    assert cli.main(["trace", "show", str(path)]) == 0
    assert "tokens     0" in capsys.readouterr().out


def test_show_damaged(capsys, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"nothing")
    assert cli.main(["trace", "show", str(path)]) == 2
    captured = capsys.readouterr()
    assert "it is no .npz file" in captured.err
    assert captured.out == ""


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    random_trace(0).save(tmp_path / "a.npz")
    picture = tmp_path / "out.png"
    assert cli.main(["trace", "show", str(tmp_path / "a.npz"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["no/folder.png", "out.unknown"])
def test_plot_that_cannot_be_written(capsys, tmp_path, name):
    pytest.importorskip("matplotlib")
    random_trace(0).save(tmp_path / "a.npz")
    arguments = ["trace", "show", str(tmp_path / "a.npz"), "--plot", str(tmp_path / name)]
    assert cli.main(arguments) == 2
    assert "--plot" in capsys.readouterr().err


def test_plot_without_matplotlib(capsys, tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    random_trace(0).save(tmp_path / "a.npz")
    arguments = ["trace", "show", str(tmp_path / "a.npz"), "--plot", str(tmp_path / "b.png")]
    assert cli.main(arguments) == 2
    assert "Install vllm-moe-offload[plot]" in capsys.readouterr().err


@pytest.mark.traces
def test_recorded(capsys):
    for path in recorded():
        assert cli.main(["trace", "show", str(path)]) == 0
        assert "DeepSeek-V2-Lite" in (text := capsys.readouterr().out) or "qwen3" in text
