import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.config import SpeculativeConfig, WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod

from vllm_moe_offload import layer as offload_layer
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.patches import admission

DROP = "Drop it, or drop --plugin moe-offload"


@pytest.fixture
def configure(checkpoint):
    """Makes vLLM's whole configuration of a small model; options are those of the plugin."""

    def make(family: str = "qwen3_moe", options: dict | None = None, **kwargs):
        kwargs.setdefault("model", str(checkpoint(family)))
        return EngineArgs(moe_offload=options or {}, **kwargs).create_engine_config()

    return make


@pytest.fixture
def refusal(configure):
    def message(*args, **kwargs) -> str:
        with pytest.raises(OffloadError) as error:
            configure(*args, **kwargs)
        return str(error.value)

    return message


def test_dense_model(refusal, checkpoint):
    message = refusal("dense")
    assert f"model = {checkpoint('dense')}: " in message
    assert "dense model" in message
    assert "--moe-offload-allow-dense" in message


def test_dense_model_when_allowed(configure):
    config = configure("dense", {"allow_dense": True}, additional_config={"other": 1})
    assert config.additional_config == {"other": 1}
    assert "moe_offload" not in config.parallel_config.worker_extension_cls


def test_bad_option_for_a_dense_model(refusal):
    assert "staging_mb = -1: " in refusal("dense", {"allow_dense": True, "staging_mb": -1})


@pytest.mark.parametrize("layers", ["0", "1", "0-1", "all"])
def test_layers_of_the_model(configure, layers):
    config = configure(options={"layers": layers})
    assert config.additional_config["moe_offload"]["layers"] == layers


@pytest.mark.parametrize("layers", ["2", "0-2", "0,99"])
def test_layers_that_the_model_does_not_have(refusal, layers):
    message = refusal(options={"layers": layers})
    assert f"layers = {layers}: " in message
    assert "decoder layers are 0 to 1" in message
    assert "Give layer numbers of this model, or all" in message


def test_data_parallel_with_expert_parallel(refusal):
    message = refusal(data_parallel_size=2, enable_expert_parallel=True)
    assert "--data-parallel-size = 2: " in message
    assert "--enable-expert-parallel" in message
    assert DROP in message


def test_context_parallel_with_expert_parallel(configure):
    config = copy.deepcopy(configure())
    config.parallel_config.prefill_context_parallel_size = 2
    admission.check_features(config)
    config.parallel_config.enable_expert_parallel = True
    with pytest.raises(OffloadError, match="--prefill-context-parallel-size = 2: ") as error:
        admission.check_features(config)
    assert "--enable-expert-parallel" in str(error.value)


def test_micro_batches(configure):
    config = copy.deepcopy(configure())
    config.parallel_config.ubatch_size = 2
    with pytest.raises(OffloadError, match="--ubatch-size = 2: "):
        admission.check_features(config)


@pytest.mark.parametrize("form", ["sharded_state", "runai_streamer_sharded"])
def test_weights_as_they_were_in_a_worker(refusal, form):
    message = refusal(load_format=form)
    assert f"--load-format = {form}: " in message
    assert "auto loads the original checkpoint" in message


@pytest.mark.parametrize("sizes", [{"data_parallel_size": 2}, {"enable_expert_parallel": True}])
def test_either_kind_of_parallelism_alone(configure, sizes):
    assert "moe_offload" in configure(**sizes).additional_config


def test_lora(refusal):
    message = refusal(enable_lora=True)
    assert "--enable-lora = True: " in message
    assert DROP in message


def test_weight_transfer(refusal):
    message = refusal(weight_transfer_config=WeightTransferConfig())
    assert f"--weight-transfer-config = {WeightTransferConfig()}: " in message
    assert DROP in message


@pytest.mark.parametrize("field", ["enable_eplb", "enable_dbo"])
def test_what_the_cpu_has_not(configure, field):
    config = copy.deepcopy(configure())
    admission.check_features(config)
    setattr(config.parallel_config, field, True)
    with pytest.raises(OffloadError) as error:
        admission.check_features(config)
    message = str(error.value)
    assert f"--{field.replace('_', '-')} = True: " in message
    assert DROP in message


def test_recording_makes_its_directory(configure, tmp_path):
    where = tmp_path / "a" / "b"
    config = configure(options={"trace_path": str(where)})
    assert config.additional_config["moe_offload"]["trace_path"] == str(where)
    assert list(where.iterdir()) == []


def test_recording_to_where_nothing_can_be_written(refusal, tmp_path):
    (tmp_path / "file").write_text("")
    message = refusal(options={"trace_path": str(tmp_path / "file")})
    assert f"trace_path = {tmp_path / 'file'}: it cannot be written to" in message
    assert "leave trace_path out" in message


@pytest.mark.parametrize(
    ("place", "option", "value"),
    [
        ("parallel_config.data_parallel_size", "--data-parallel-size", 2),
        ("parallel_config.prefill_context_parallel_size", "--prefill-context-parallel-size", 2),
        ("cache_config.kv_sharing_fast_prefill", "--kv-sharing-fast-prefill", True),
        ("speculative_config", "enable_adaptive_verification", True),
    ],
)
def test_recording_beside_what_mixes_rows(configure, tmp_path, place, option, value):
    config = copy.deepcopy(configure())
    wanted = MoeOffloadConfig.parse({"trace_path": str(tmp_path / "traces")})
    admission.check_recording(config, wanted)
    owner, _, field = place.rpartition(".")
    if field == "speculative_config":
        config.speculative_config = SimpleNamespace(enable_adaptive_verification=True)
    else:
        assert hasattr(getattr(config, owner), field)
        setattr(getattr(config, owner), field, value)
    admission.check_recording(config, MoeOffloadConfig.parse({}))
    with pytest.raises(OffloadError) as error:
        admission.check_recording(config, wanted)
    assert f"{option} = {value}: it does not work with trace_path" in str(error.value)
    assert "drop --moe-offload-trace-path" in str(error.value)


def test_adaptive_verification_is_still_called_that():
    assert "enable_adaptive_verification" in SpeculativeConfig.__dataclass_fields__


EXPERTS = [set(), {"experts"}, {"w13_weight"}, {"mlp.experts.w2_weight"}, {"self_attn", "experts"},
           {"mlp"}, {"layers"}]  # fmt: skip
OTHERS = [{"self_attn"}, {"embed_tokens", "qkv_proj"}, {"w1"}, {"shared_experts"}]


@pytest.mark.parametrize("names", EXPERTS, ids=sorted)
def test_cpu_offload_of_experts(refusal, names):
    message = refusal(cpu_offload_gb=1.5, cpu_offload_params=names)
    assert "--cpu-offload-gb = 1.5: " in message
    assert "--cpu-offload-params" in message
    assert DROP in message


@pytest.mark.parametrize("names", EXPERTS, ids=sorted)
def test_prefetch_of_experts(refusal, names):
    message = refusal(offload_group_size=2, offload_params=names)
    assert "--offload-group-size = 2: " in message
    assert "--offload-params" in message
    assert DROP in message


@pytest.mark.parametrize("names", OTHERS, ids=sorted)
def test_cpu_offload_of_other_weights(configure, names):
    assert configure(cpu_offload_gb=1, cpu_offload_params=names).additional_config
    assert configure(offload_group_size=2, offload_params=names).additional_config


def test_selection_of_weights_that_is_not_used(configure):
    assert configure(cpu_offload_params={"experts"}).additional_config


def copy_without(source, target, lost: str):
    """A checkpoint like another one, without a tensor."""
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
            continue
        tensors = load_file(file)
        tensors.pop(lost, None)
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("qwen3_moe", "model.layers.1.mlp.experts.6.down_proj.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w3.weight"),
    ],
)
def test_missing_expert_tensor(refusal, checkpoint, tmp_path, family, lost):
    message = refusal(model=copy_without(checkpoint(family), tmp_path, lost))
    assert f"checkpoint = {tmp_path}: " in message
    assert f"1 expert tensors are missing, the first is {lost}" in message
    assert "Download the checkpoint again or repair it" in message


def test_dummy_weights_need_no_tensors(configure, checkpoint, tmp_path):
    lost = "model.layers.1.mlp.experts.6.down_proj.weight"
    path = copy_without(checkpoint("qwen3_moe"), tmp_path, lost)
    assert configure(model=path, load_format="dummy").additional_config


@pytest.mark.parametrize("family", ["gpt_oss", "granite_moe"])
def test_stacked_experts(configure, family):
    assert configure(family).additional_config


def test_unknown_version_comes_first(monkeypatch):
    monkeypatch.delenv("MOE_OFFLOAD_ANY_VLLM", raising=False)
    monkeypatch.setattr(admission.vllm, "__version__", "0.31.0")
    with pytest.raises(OffloadError, match=r"vLLM = 0\.31\.0: "):
        EngineArgs(".", plugin="moe-offload").create_engine_config()


ENGINE = SimpleNamespace(config=MoeOffloadConfig(), device=torch.device("cpu"))


def test_quantised_layer_of_another_format():
    class SomeMoEMethod:
        pass

    assert offload_layer.is_quantised(SomeMoEMethod())
    with pytest.raises(OffloadError) as error:
        offload_layer.offload_quantised(SomeMoEMethod(), ENGINE, "model.layers.3.mlp.experts")
    message = str(error.value)
    assert "quantization = SomeMoEMethod: " in message
    assert "the experts of model.layers.3.mlp.experts cannot be offloaded" in message
    assert "Use a checkpoint with 16-bit and 32-bit experts" in message


def test_unquantised_layer_keeps_its_class_name():
    method = object.__new__(UnquantizedFusedMoEMethod)
    assert not offload_layer.is_quantised(method)
    offload_layer.offload(method, ENGINE, "model.layers.3.mlp.experts")
    assert type(method).__name__ == "UnquantizedFusedMoEMethod"
    assert isinstance(method, UnquantizedFusedMoEMethod)
    assert isinstance(method, offload_layer.OffloadMixin)
    assert not method.is_monolithic
    assert not method.requires_device_loading


def fake_layer(activation: str):
    return SimpleNamespace(
        activation=SimpleNamespace(value=activation), moe_config=SimpleNamespace(swiglu_limit=3.0)
    )


def test_unsupported_activation():
    with pytest.raises(OffloadError) as error:
        offload_layer._activation(fake_layer("mish"), "model.layers.3.mlp.experts")
    message = str(error.value)
    assert "activation = mish: " in message
    assert "model.layers.3.mlp.experts" in message
    assert "silu" in message.rsplit(". ", maxsplit=1)[-1]


def test_constants_of_an_activation():
    activation = offload_layer._activation(fake_layer("silu"), "experts")
    assert (activation.name, activation.limit, activation.alpha) == ("silu", 3.0, 1.0)
