import zipfile

import numpy as np
import pytest
from traces import random_trace, trace_of

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.trace import Trace, join, load, load_all

FIELDS = ("expert_ids", "sequence_starts", "num_experts", "model", "source", "is_decode")


@pytest.fixture
def arrays():
    return {
        "expert_ids": np.zeros((4, 2, 3), np.uint8) + np.arange(3, dtype=np.uint8),
        "sequence_starts": np.array([0, 1, 4]),
        "num_experts": np.int32(8),
        "model": np.str_("m"),
        "source": np.str_("s"),
    }


def written(tmp_path, arrays):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **arrays)
    return path


def test_round_trip(tmp_path):
    trace = random_trace(0)
    decode = np.arange(trace.num_tokens) % 2 == 0
    trace = Trace(trace.expert_ids, trace.sequence_starts, 8, "modèl", "somewhere", decode)
    trace.save(tmp_path / "a.npz")
    again = load(tmp_path / "a.npz")
    for field in FIELDS:
        assert np.array_equal(getattr(again, field), getattr(trace, field)), field
    assert again.expert_ids.dtype == trace.expert_ids.dtype
    assert list(tmp_path.iterdir()) == [tmp_path / "a.npz"]


def test_properties(tmp_path, arrays):
    trace = load(written(tmp_path, arrays))
    sizes = (trace.num_tokens, trace.num_layers, trace.top_k, trace.num_sequences)
    assert sizes == (4, 2, 3, 2)
    assert trace.sequence_of_token().tolist() == [0, 1, 1, 1]
    assert trace.is_decode is None


def test_empty_trace(tmp_path):
    trace = trace_of(np.zeros((0, 2, 3)), 4, [])
    trace.save(tmp_path / "a.npz")
    assert load(tmp_path / "a.npz").num_tokens == 0


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    random_trace(0).save(path)
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        random_trace(1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("key", ["expert_ids", "sequence_starts", "num_experts", "model"])
def test_missing_key(tmp_path, arrays, key):
    del arrays[key]
    with pytest.raises(OffloadError, match=f"it has no {key}"):
        load(written(tmp_path, arrays))


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("expert_ids", np.zeros((4, 2, 3), np.int64), "int64"),
        ("expert_ids", np.zeros((4, 2), np.uint8), "shape"),
        ("expert_ids", np.full((4, 2, 3), 8, np.uint8), "expert 8 of 8"),
        ("sequence_starts", np.array([0, 3]), "does not ascend from 0 to the 4 tokens"),
        ("sequence_starts", np.array([1, 4]), "does not ascend"),
        ("sequence_starts", np.array([0, 3, 2, 4]), "does not ascend"),
        ("sequence_starts", np.array([], np.int64), "not a list of int64"),
        ("sequence_starts", np.array([0.0, 4.0]), "not a list of int64"),
        ("num_experts", np.int32(0), "num_experts is 0"),
        ("num_experts", np.array([8, 8]), "num_experts has the wrong type"),
        ("num_experts", np.float64(8), "num_experts has the wrong type"),
        ("model", np.int32(1), "model has the wrong type"),
        ("model", np.array([{}], dtype=object), "cannot be read"),
        ("is_decode", np.zeros(3, bool), "is_decode"),
        ("is_decode", np.zeros(4, np.int8), "is_decode"),
    ],
)
def test_foreign_content(tmp_path, arrays, key, value, problem):
    path = written(tmp_path, {**arrays, key: value})
    with pytest.raises(OffloadError, match=problem) as error:
        load(path)
    assert error.value.value == path


def test_no_file(tmp_path):
    with pytest.raises(OffloadError, match="there is no such file"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(100)])
def test_other_files(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(OffloadError, match=r"it is no \.npz file"):
        load(path)
    with pytest.raises(OffloadError):
        load(tmp_path)


def test_one_array(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(OffloadError, match=r"it is no \.npz file"):
        load(tmp_path / "a.npy")


def test_foreign_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(OffloadError, match="it has no expert_ids"):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.999])
def test_truncated(tmp_path, keep):
    path = tmp_path / "a.npz"
    random_trace(0, tokens=300).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(OffloadError):
        load(path)


@pytest.mark.parametrize("seed", range(30))
def test_damaged_bytes_are_reported_or_harmless(tmp_path, seed):
    path = tmp_path / "a.npz"
    random_trace(0, tokens=300).save(path)
    content = bytearray(path.read_bytes())
    random = np.random.default_rng(seed)
    for place in random.integers(0, len(content), 5):
        content[place] ^= int(random.integers(1, 256))
    path.write_bytes(content)
    try:
        trace = load(path)
    except OffloadError:
        return
    assert trace.expert_ids.max() < trace.num_experts


def test_all_of_a_directory(tmp_path):
    for number, name in enumerate(("b", "a", "c")):
        random_trace(number, tokens=10 + number).save(tmp_path / f"{name}.npz")
    other = random_trace(3, tokens=5)
    Trace(other.expert_ids, other.sequence_starts, 8, "other", "s").save(tmp_path / "d.npz")
    (tmp_path / "stage0.warm-start").write_bytes(b"no trace")
    joined, apart = load_all(tmp_path)
    parts = [load(tmp_path / f"{name}.npz") for name in "abc"]
    assert np.array_equal(joined.expert_ids, np.concatenate([part.expert_ids for part in parts]))
    lengths = np.concatenate([np.diff(part.sequence_starts) for part in parts])
    assert np.array_equal(np.diff(joined.sequence_starts), lengths)
    assert (joined.model, apart.model, apart.num_tokens) == ("test", "other", 5)


def test_one_file_of_a_directory(tmp_path):
    random_trace(0).save(tmp_path / "a.npz")
    (trace,) = load_all(tmp_path / "a.npz")
    assert trace.num_tokens == 40


@pytest.mark.parametrize("known", [True, False])
def test_joined_decode_steps(known):
    first = random_trace(0, tokens=4)
    decode = np.array([True, False, False, True])
    first = Trace(first.expert_ids, first.sequence_starts, 8, "m", "s", decode)
    second = Trace(first.expert_ids, first.sequence_starts, 8, "m", "s", decode if known else None)
    joined = join([first, second])
    expected = [*decode, *decode] if known else None
    assert (joined.is_decode is None) if expected is None else (
        joined.is_decode.tolist() == expected
    )  # fmt: skip


def test_directory_without_traces(tmp_path):
    with pytest.raises(OffloadError, match=r"there is no \.npz file in it"):
        load_all(tmp_path)
