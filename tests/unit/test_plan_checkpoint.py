"""Reading headers, and saying what is wrong with a checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.headers import read_header
from vllm_moe_offload.plan.checkpoint import find_folder, read_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards with an index, and a file that the index does not name."""
    names = {}
    for number in (1, 2):
        file = f"model-{number:05}-of-00002.safetensors"
        tensors = {f"layers.{number}.weight": np.ones((2, number), np.float32),
                   f"layers.{number}.bias": np.ones((), np.int8)}  # fmt: skip
        safetensors_numpy.save_file(tensors, tmp_path / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    safetensors_numpy.save_file({"again": np.ones(5)}, tmp_path / "consolidated.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3}')
    return tmp_path


def refusal(model: Path | str, **environment) -> str:
    with pytest.raises(OffloadError) as error:
        read_checkpoint(str(model), environment)
    return str(error.value)


def test_files_of_the_index(folder):
    checkpoint = read_checkpoint(str(folder))
    assert checkpoint.config == {"num_hidden_layers": 3}
    assert sorted(checkpoint.tensors) == [
        ("layers.1.bias", "I8", (), 1),
        ("layers.1.weight", "F32", (2, 1), 8),
        ("layers.2.bias", "I8", (), 1),
        ("layers.2.weight", "F32", (2, 2), 16),
    ]


def test_all_files_without_index(folder):
    (folder / INDEX).unlink()
    assert len(read_checkpoint(str(folder)).tensors) == 5


def test_file_without_tensors(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors_numpy.save_file({}, file)
    assert list(read_header(file)) == []


@pytest.mark.parametrize("has_index", [True, False])
def test_missing_shard(folder, has_index):
    (folder / "model-00001-of-00002.safetensors").unlink()
    if not has_index:
        (folder / INDEX).unlink()
        (folder / "consolidated.safetensors").unlink()
    message = refusal(folder)
    assert "1 of 2 shards are missing, the first is model-00001-of-00002.safetensors" in message
    assert "Download the missing files" in message


def test_tensor_that_no_file_holds(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["layers.7.weight"] = "model-00002-of-00002.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    assert "1 tensors of model.safetensors.index.json are in no file" in refusal(folder)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[", ""])
def test_damaged_index(folder, text):
    (folder / INDEX).write_text(text)
    message = refusal(folder)
    assert INDEX in message
    assert "Download the checkpoint again or repair it" in message


@pytest.mark.parametrize("kept", [0, 5, 8, 40, -1])
def test_truncated_file(folder, kept):
    file = folder / "model-00001-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    message = refusal(folder)
    assert file.name in message
    assert ("header" in message) or (f"but it has {len(content) - 1}" in message)
    assert "Download the checkpoint again or repair it" in message


def damage(file: Path, header: object) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


@pytest.mark.parametrize(
    "header",
    [
        [1],
        b"{",
        b"\xff\xfe",
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"a": 3},
    ],
)
def test_damaged_header(folder, header):
    damage(folder / "model-00002-of-00002.safetensors", header)
    assert "the header is damaged" in refusal(folder)


def test_types_of_the_future_are_measured_by_their_place(tmp_path):
    file = tmp_path / "model.safetensors"
    damage(file, {"a": {"dtype": "F5", "shape": [3], "data_offsets": [0, 8]}})
    assert [tensor.num_bytes for tensor in read_header(file)] == [8]


def test_pointer_of_git_lfs(folder):
    file = folder / "model-00002-of-00002.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "Run git lfs pull" in refusal(folder)


def test_no_config(folder):
    (folder / "config.json").unlink()
    message = refusal(folder)
    assert "it has no config.json" in message
    assert "Hugging Face" in message


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json: it is no valid JSON object" in refusal(folder)


def test_no_safetensors(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    assert "it holds no safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_name_on_the_hub(tmp_path, variable):
    inside = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}
    cached = tmp_path / inside[variable] / "models--Some--Model-1.5"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0a1b")
    snapshot = cached / "snapshots" / "0a1b"
    message = refusal("Some/Model-1.5", **{variable: str(tmp_path)})
    assert "Download it with hf download Some/Model-1.5" in message
    snapshot.mkdir(parents=True)
    assert find_folder("Some/Model-1.5", {variable: str(tmp_path)}) == snapshot


@pytest.mark.parametrize("model", ["no such/path/at all", "/no/such/folder"])
def test_no_folder(model, tmp_path):
    assert "Give the folder of a checkpoint" in refusal(model, HF_HOME=str(tmp_path))
