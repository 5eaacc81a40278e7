import random
from dataclasses import replace

import numpy as np
import pytest

from vllm_moe_offload import npz, warm_start
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.warm_start import ModelIdentity, WarmStartFile

IDENTITY = ModelIdentity("some/model", ("layers.1.experts", "layers.2.experts"), (8, 8), (2, 2))
SECTIONS = {
    "hot_set": {"score_LE": np.arange(16, dtype=np.float32).reshape(2, 8)},
    "later": {"a": np.ones(3), "b": np.zeros((0, 2), np.int16)},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "stage0.warm-start"


@pytest.fixture
def saved(path):
    WarmStartFile(path, IDENTITY).save(SECTIONS)
    return path


def refusal(path, identity=IDENTITY):
    file = WarmStartFile(path, identity)
    with pytest.raises(OffloadError) as caught:
        file.load()
    assert str(path) in str(caught.value)
    assert "Delete it or give another trace_path" in str(caught.value)
    return file, str(caught.value)


def test_round_trip(saved):
    found = WarmStartFile(saved, IDENTITY).load()
    assert {name: set(section) for name, section in found.items()} == {
        name: set(section) for name, section in SECTIONS.items()
    }
    for name, section in SECTIONS.items():
        for key, array in section.items():
            assert np.array_equal(found[name][key], array)
            assert found[name][key].dtype == array.dtype


def test_no_file_yet(path):
    assert WarmStartFile(path, IDENTITY).load() is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "other/model"),
        ("layers", ("layers.1.experts", "layers.3.experts")),
        ("layers", ("layers.1.experts",)),
        ("num_experts", (8, 16)),
        ("top_k", (2, 1)),
    ],
)
def test_another_model(saved, name, value):
    _, message = refusal(saved, replace(IDENTITY, **{name: value}))
    assert f"another model, which differs in {name}" in message


def test_another_version(path, monkeypatch):
    monkeypatch.setattr(warm_start, "VERSION", 2)
    WarmStartFile(path, IDENTITY).save(SECTIONS)
    monkeypatch.undo()
    assert "its version is not 1" in refusal(path)[1]


@pytest.mark.parametrize("version", [np.array([1]), np.str_("1"), np.float32(1.5)], ids=repr)
def test_no_version(path, version):
    with path.open("wb") as file:
        np.savez(file, version=version, **IDENTITY.arrays())
    refusal(path)


def test_something_else(path):
    for content in (b"", b"hello", b"PK\x05\x06" + bytes(18), bytes(100)):
        path.write_bytes(content)
        refusal(path)
    path.unlink()
    path.mkdir()
    refusal(path)


def test_cut_short(saved):
    content = saved.read_bytes()
    for length in range(0, len(content), 37):
        saved.write_bytes(content[:length])
        refusal(saved)


def test_flipped_bits(saved):
    """Damage is found, or lies where nothing is stored; it is never read as something else."""
    content = saved.read_bytes()
    chance = random.Random(0)
    found = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        saved.write_bytes(damaged)
        try:
            sections = WarmStartFile(saved, IDENTITY).load()
        except OffloadError:
            found += 1
            continue
        assert all(
            np.array_equal(sections[name][key], array)
            for name, section in SECTIONS.items()
            for key, array in section.items()
            if key in sections.get(name, {})
        )
    assert found > 200


def test_never_runs_code(path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    with path.open("wb") as file:
        np.savez(file, version=np.array(Evil(), object), allow_pickle=True)
    refusal(path)


def test_a_refused_file_is_kept(saved):
    foreign = saved.read_bytes()
    mine = replace(IDENTITY, model="other/model")
    file, _ = refusal(saved, mine)
    file.save({"hot_set": {"x": np.ones(1)}})
    assert saved.with_name(f"{saved.name}.old").read_bytes() == foreign
    assert list(WarmStartFile(saved, mine).load()) == ["hot_set"]
    before = set(saved.parent.iterdir())
    file.save({"hot_set": {"x": np.ones(2)}})
    assert set(saved.parent.iterdir()) == before
    assert saved.with_name(f"{saved.name}.old").read_bytes() == foreign


def test_a_failing_save_keeps_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(npz.np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space"):
        WarmStartFile(saved, IDENTITY).save(SECTIONS)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]
