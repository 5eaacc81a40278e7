import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_moe_offload.checkpoint_check import (
    file_of,
    groups_out_of_order,
    missing_expert_tensors,
    tensor_names,
)
from vllm_moe_offload.checkpoints import make_checkpoint
from vllm_moe_offload.errors import OffloadError

DENSE = ["model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "lm_head.weight"]
EXPERTS = 4
NAMES = [
    f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
    for layer in range(2)
    for expert in range(EXPERTS)
    for part in ("gate_proj", "up_proj", "down_proj")
]


@given(st.sets(st.sampled_from(NAMES), max_size=3), st.permutations(NAMES))
def test_what_one_expert_has_and_another_lacks(lost, names):
    left = [name for name in names if name not in lost]
    assert missing_expert_tensors(DENSE + left, EXPERTS) == sorted(lost)


@pytest.mark.parametrize(
    "stacked",
    [
        ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj_bias"],
        ["model.layers.0.block_sparse_moe.input_linear.weight"],
        ["model.layers.0.mlp.shared_expert.up_proj.weight"],
        [],
    ],
)
def test_checkpoints_without_single_experts(stacked):
    assert missing_expert_tensors(DENSE + stacked, EXPERTS) == []


@pytest.mark.parametrize("folder", ["experts", "expert"])
def test_names_of_other_families(folder):
    names = [f"layers.1.block_sparse_moe.{folder}.{e}.w1.weight" for e in (0, 1, 3)]
    assert missing_expert_tensors(names, 4) == [f"layers.1.block_sparse_moe.{folder}.2.w1.weight"]


def test_all_last_experts_missing():
    names = [name for name in NAMES if ".experts.3." not in name]
    assert len(missing_expert_tensors(names, EXPERTS)) == 6


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granite_moe"])
def test_whole_checkpoint(tmp_path, family):
    make_checkpoint(tmp_path, family, num_layers=2, hidden_size=64, intermediate_size=32)
    assert missing_expert_tensors(tensor_names(tmp_path), 8) == []


def test_checkpoint_that_lacks_a_tensor(tmp_path):
    path = make_checkpoint(
        tmp_path, "qwen3_moe", num_layers=2, hidden_size=64, intermediate_size=32
    )
    lost = "model.layers.1.mlp.experts.5.up_proj.weight"
    names = tensor_names(path)
    assert len(list(path.glob("*.safetensors"))) > 1
    assert lost in names
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(lost, None) is not None:
            save_file(tensors, file)
    assert missing_expert_tensors(tensor_names(path), 8) == [lost]


def test_folder_without_safetensors(tmp_path):
    assert tensor_names(tmp_path) == []


@pytest.fixture
def shards(tmp_path):
    """Files of a small checkpoint, the index left out of the list."""
    make_checkpoint(tmp_path, "qwen3_moe", num_layers=2, hidden_size=64, intermediate_size=32)
    found = sorted(tmp_path.glob("*.safetensors"))
    assert len(found) > 1
    return found


def refusal(folder):
    with pytest.raises(OffloadError) as error:
        tensor_names(folder)
    return str(error.value)


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_file_that_is_cut_off(shards, left):
    shards[0].write_bytes(shards[0].read_bytes()[:left])
    message = refusal(shards[0].parent)
    assert str(shards[0]) in message
    assert "Download the checkpoint again" in message


@pytest.mark.parametrize("has_index", [True, False])
def test_missing_shard(shards, has_index):
    shards[1].unlink()
    if not has_index:
        (shards[1].parent / "model.safetensors.index.json").unlink()
    message = refusal(shards[1].parent)
    assert shards[1].name in message
    assert "Download the missing files" in message


def test_files_that_no_index_names_are_not_read(shards):
    (shards[0].parent / "consolidated.safetensors").write_bytes(b"something else")
    assert missing_expert_tensors(tensor_names(shards[0].parent), 8) == []


def test_index_of_files_that_are_not_here(shards):
    names = tensor_names(shards[0].parent)
    for number, shard in enumerate(shards):
        shard.rename(shard.with_name(f"consolidated{number}.safetensors"))
    assert sorted(tensor_names(shards[0].parent)) == sorted(names)


def test_file_of_a_tensor(shards):
    folder = shards[0].parent
    for shard in shards:
        for name in load_file(shard):
            assert file_of(folder, name) == shard.name
    assert file_of(folder, "lm_head.nothing") is None


@pytest.mark.parametrize("other", ["", "no such folder"])
def test_no_file_of_another_kind_of_checkpoint(tmp_path, other):
    assert file_of(tmp_path / other, "lm_head.weight") is None


@pytest.mark.parametrize(
    ("indices", "in_order"),
    [([0, 0, 1, 1], True), ([0, 0, 0, 0], True), ([1, 0, 1, 0], False), ([0, 1, 1, 0], False)],
)
def test_groups_in_the_order_of_activations(tmp_path, indices, in_order):
    name = "model.layers.0.mlp.experts.0.up_proj.g_idx"
    other = "model.layers.0.self_attn.q_proj.g_idx"  # not of experts, vLLM's business
    tensors = {name: torch.tensor(indices).int(), other: torch.tensor([1, 0]).int()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert groups_out_of_order(tmp_path) == (None if in_order else name)


def test_no_groups_to_look_at(shards, tmp_path):
    assert groups_out_of_order(shards[0].parent) is None
    assert groups_out_of_order(tmp_path / "no such folder") is None
