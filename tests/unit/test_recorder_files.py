import errno
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_moe_offload.recorder.files import TraceFiles, TraceInfo
from vllm_moe_offload.recorder.sequences import SortedTokens
from vllm_moe_offload.trace import Trace, load, load_all

INFO = TraceInfo(num_experts=300, model="m", source="s")
LAYERS, TOP_K = 3, 2
TOKEN_BYTES = LAYERS * TOP_K * 2 + 1


def tokens(*sequences):
    """Some tokens each of some sequences; ids tell sequence and a running number."""
    numbers, ids = [], []
    for sequence, start, count in sequences:
        numbers += [sequence] * count
        ids += [[[sequence, start + n]] * LAYERS for n in range(count)]
    return SortedTokens(
        np.array(numbers, np.int64),
        np.array(ids, np.uint16).reshape(-1, LAYERS, TOP_K),
        np.array([number % 2 == 0 for number in numbers], bool),
    )


def sequences_in(trace):
    cuts = trace.sequence_starts[1:-1]
    found = []
    for ids, decode in zip(np.split(trace.expert_ids, cuts), np.split(trace.is_decode, cuts),
                           strict=True):  # fmt: skip
        assert (ids == ids[:, :1]).all()
        sequence = int(ids[0, 0, 0])
        assert set(ids[:, 0, 0].tolist()) == {sequence}
        assert set(decode.tolist()) == {sequence % 2 == 0}
        found.append((sequence, ids[:, 0, 1].tolist()))
    return found


def make(directory, max_tokens=1000, complain=None):
    return TraceFiles(
        directory, "stem", INFO, max_bytes=max_tokens * TOKEN_BYTES,
        complain=complain or pytest.fail,
    )  # fmt: skip


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_nothing_is_no_file(tmp_path):
    assert make(tmp_path).save()
    assert names(tmp_path) == []


def test_sequences_stay_whole_from_save_to_save(tmp_path):
    files = make(tmp_path)
    files.add(tokens((0, 0, 3), (1, 0, 2)))
    files.save()
    assert names(tmp_path) == ["stem-0001.npz"]
    files.add(tokens((0, 3, 2), (2, 0, 1)))
    files.save()
    trace = load(files.path)
    assert sequences_in(trace) == [(0, [0, 1, 2, 3, 4]), (1, [0, 1]), (2, [0])]
    assert (trace.num_experts, trace.model, trace.source) == (300, "m", "s")
    assert names(tmp_path) == ["stem-0001.npz"]


def test_no_write_without_news(tmp_path):
    files = make(tmp_path)
    files.add(tokens((0, 0, 3)))
    files.save()
    files.path.unlink()
    files.save()
    files.add(tokens())
    files.save()
    assert names(tmp_path) == []


def test_rotation(tmp_path):
    files = make(tmp_path, max_tokens=4)
    files.add(tokens((0, 0, 3), (1, 0, 7), (2, 0, 1)))
    assert names(tmp_path) == ["stem-0001.npz", "stem-0002.npz"]
    files.save()
    found = [sequences_in(load(path)) for path in sorted(tmp_path.iterdir())]
    assert found == [
        [(0, [0, 1, 2]), (1, [0])], [(1, [1, 2, 3, 4])], [(1, [5, 6]), (2, [0])]
    ]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=4)),
    max_tokens=st.integers(1, 20),
    saves=st.lists(st.booleans(), min_size=1),
)
def test_every_token_is_in_one_file(tmp_path_factory, batches, max_tokens, saves):
    directory = tmp_path_factory.mktemp("traces")
    files = make(directory, max_tokens)
    length = dict.fromkeys(range(5), 0)
    for number, batch in enumerate(batches):
        chosen = []
        for sequence, count in dict(batch).items():
            chosen.append((sequence, length[sequence], count))
            length[sequence] += count
        files.add(tokens(*chosen))
        if saves[number % len(saves)]:
            files.save()
    files.save()
    found = {sequence: [] for sequence in length}
    for path in sorted(directory.iterdir()):
        trace = load(path)
        assert trace.num_tokens <= max_tokens
        for sequence, ids in sequences_in(trace):
            found[sequence] += ids
    assert found == {sequence: list(range(count)) for sequence, count in length.items()}


@pytest.fixture
def disk(monkeypatch):
    """A disk that can be full."""
    disk = SimpleNamespace(full=False, lines=[])
    original = Trace.save

    def save(self, path):
        if disk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, path)

    monkeypatch.setattr(Trace, "save", save)
    return disk


def test_full_disk_loses_nothing_that_fits_a_file(tmp_path, disk):
    files = make(tmp_path, complain=disk.lines.append)
    files.add(tokens((0, 0, 2)))
    assert files.save()
    disk.full = True
    files.add(tokens((0, 2, 2)))
    assert not files.save()
    assert sequences_in(load(files.path)) == [(0, [0, 1])], "what was saved stays"
    disk.full = False
    files.add(tokens((0, 4, 1)))
    assert files.save()
    assert sequences_in(load(files.path)) == [(0, [0, 1, 2, 3, 4])]
    assert files.lost_tokens == 0
    (line,) = disk.lines
    for part in (str(files.path), "No space left", "Free space", "server is not affected"):
        assert part in line


def test_full_disk_bounds_memory(tmp_path, disk):
    files = make(tmp_path, max_tokens=5, complain=disk.lines.append)
    files.add(tokens((0, 0, 2)))
    files.save()
    disk.full = True
    for number in range(100):
        files.add(tokens((1, 3 * number, 3)))
        files.save()
        assert sum(part.sequence_N.size for parts in files._parts.values() for part in parts) < 5
    disk.full = False
    files.add(tokens((2, 0, 1)))
    files.save()
    kept = sum(load(path).num_tokens for path in tmp_path.iterdir())
    assert kept + files.lost_tokens == 2 + 300 + 1
    assert names(tmp_path) == ["stem-0001.npz", "stem-0002.npz"], "no gap where nothing was saved"
    assert sequences_in(load(tmp_path / "stem-0001.npz")) == [(0, [0, 1])]


def test_directory_is_read_as_one_trace(tmp_path):
    files = make(tmp_path, max_tokens=4)
    files.add(tokens((0, 0, 3), (1, 0, 7)))
    files.save()
    (trace,) = load_all(tmp_path)
    assert sequences_in(trace) == [(0, [0, 1, 2]), (1, [0]), (1, [1, 2, 3, 4]), (1, [5, 6])]
