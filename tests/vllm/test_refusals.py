"""What real engines refuse, and that they do so before weights are loaded."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file
from served import engine, offloaded

from vllm_moe_offload.errors import OffloadError


@pytest.fixture
def no_weights_loaded(monkeypatch):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def fail(*_args, **_kwargs):
        pytest.fail("weights were loaded before the refusal")

    monkeypatch.setattr(DefaultModelLoader, "load_weights", fail)


def refusal(path, family, **kwargs):
    with pytest.raises(OffloadError) as error, engine(path, family, **kwargs):
        pass
    return str(error.value)


@pytest.mark.usefixtures("no_weights_loaded")
def test_dense_model(checkpoint):
    message = refusal(checkpoint("dense"), "dense", **offloaded())
    assert "dense" in message
    assert "--moe-offload-allow-dense" in message


def test_dense_model_served_untouched_when_allowed(checkpoint):
    with engine(checkpoint("dense"), "dense", **offloaded(allow_dense=True)) as llm:
        assert llm.collective_rpc("moe_offload_stats") == [None]


@pytest.mark.usefixtures("no_weights_loaded")
def test_staging_too_small_for_an_expert(checkpoint):
    message = refusal(checkpoint("mixtral"), "mixtral", **offloaded(staging_mb=0.01))
    assert "staging_mb = 0.01" in message
    assert "at least" in message


@pytest.mark.usefixtures("no_weights_loaded")
def test_pool_larger_than_the_machine(checkpoint, monkeypatch):
    from vllm_moe_offload import engine as engine_module
    from vllm_moe_offload.memory import HostMemory

    monkeypatch.setattr(
        engine_module,
        "available_host_memory",
        lambda: HostMemory(2 << 20, "the container's limit of 2097152 bytes"),
    )
    message = refusal(checkpoint("mixtral"), "mixtral", **offloaded(cache_fraction=0))
    assert "the container's limit" in message
    assert "leaves 2 MiB" in message


@pytest.mark.usefixtures("no_weights_loaded")
def test_slots_larger_than_the_device(checkpoint, monkeypatch):
    from vllm_moe_offload import engine as engine_module
    from vllm_moe_offload.memory import HostMemory

    monkeypatch.setattr(
        engine_module, "available_host_memory", lambda: HostMemory(1 << 20, "the machine")
    )
    message = refusal(checkpoint("mixtral"), "mixtral", **offloaded(gpu_gb=1000))
    assert "gpu_gb = 1000" in message
    assert "Lower gpu_gb" in message


def drop_tensor(source, target, name):
    """Copy a checkpoint without one tensor."""
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        tensors.pop(name, None)
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    index = json.loads((target / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (target / "model.safetensors.index.json").write_text(json.dumps(index))


MISSING = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.mark.usefixtures("no_weights_loaded")
def test_checkpoint_without_one_expert_tensor(checkpoint, tmp_path):
    drop_tensor(checkpoint("qwen3_moe"), tmp_path, MISSING)
    message = refusal(tmp_path, "qwen3_moe", **offloaded())
    assert MISSING in message
    assert "Download" in message


@pytest.mark.usefixtures("no_weights_loaded")
@pytest.mark.parametrize("fault", ["cut off", "missing"])
def test_checkpoint_with_a_bad_file(checkpoint, tmp_path, fault):
    shutil.copytree(checkpoint("qwen3_moe"), tmp_path, dirs_exist_ok=True)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    if fault == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    message = refusal(tmp_path, "qwen3_moe", **offloaded())
    assert file.name in message
    assert "Download the" in message


def test_nan_among_the_weights(checkpoint, tmp_path):
    shutil.copytree(checkpoint("qwen3_moe"), tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        if MISSING in tensors:
            tensors[MISSING][3, 1] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
            damaged = file.name
    message = refusal(tmp_path, "qwen3_moe", **offloaded())
    assert f"the first is {MISSING} in {damaged}: it holds NaN" in message
    assert "Download the checkpoint again" in message


def test_missing_expert_tensor_is_noticed_without_the_headers(checkpoint, tmp_path, monkeypatch):
    """Checkpoints that are not on this disk are checked by what the loader has written."""
    from vllm_moe_offload.patches import admission

    monkeypatch.setattr(admission, "check_checkpoint", lambda _config: None)
    drop_tensor(checkpoint("qwen3_moe"), tmp_path, MISSING)
    assert MISSING in refusal(tmp_path, "qwen3_moe", **offloaded())


@pytest.mark.usefixtures("no_weights_loaded")
def test_worker_that_has_not_loaded_the_plugin(checkpoint, monkeypatch):
    import sys

    from vllm_moe_offload import patches

    monkeypatch.setattr(patches, "_registered", False)
    monkeypatch.setenv("VLLM_PLUGINS", "some-other-plugin")
    monkeypatch.delitem(sys.modules, "vllm_moe_offload.patches.worker_guard", raising=False)
    message = refusal(checkpoint("mixtral"), "mixtral", **offloaded())
    assert "VLLM_PLUGINS = some-other-plugin" in message
    assert "Install vllm-moe-offload" in message


@pytest.mark.usefixtures("no_weights_loaded")
def test_unknown_version_of_vllm(checkpoint, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    message = refusal(checkpoint("mixtral"), "mixtral", **offloaded())
    assert "0.99.0" in message
    assert "<0.34,>=0.32" in message
    assert "MOE_OFFLOAD_ANY_VLLM=1" in message


def test_reloading_weights(checkpoint):
    with (
        engine(checkpoint("mixtral"), "mixtral", **offloaded()) as llm,
        pytest.raises(OffloadError, match="Restart the server"),
    ):
        llm.collective_rpc("reload_weights")
