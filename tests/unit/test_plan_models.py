"""Exact sizes: small real checkpoints, and headers in the shape of published ones."""

import json
import math
import resource
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vllm_moe_offload.budget import LayerDemand, plan_budget
from vllm_moe_offload.checkpoints import MOE_FAMILIES, make_checkpoint
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.headers import StoredTensor
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layout import ROW_ALIGNMENT, TENSOR_ALIGNMENT, ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec
from vllm_moe_offload.plan import tensors as plan_tensors
from vllm_moe_offload.plan.checkpoint import Checkpoint, read_checkpoint
from vllm_moe_offload.plan.model import Model, describe, element_size

LAYERS, EXPERTS, TOP_K, HIDDEN, WIDTH = 4, 8, 2, 96, 40
"""A width of 40 gives sizes that the alignment changes."""

BITS = {"U8": 8, "F8_E4M3": 8, "BF16": 16, "F16": 16, "F32": 32, "I32": 32, "I64": 64}


@pytest.fixture(scope="module", params=[*MOE_FAMILIES, "dense"])
def family(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, make_checkpoint(
        folder,
        request.param,
        num_layers=LAYERS,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
    )


def sizes_by_safetensors(folder: Path) -> dict[str, int]:
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dictionary
                sizes[name] = stored.get_tensor(name).nbytes
    return sizes


def real_layout(family: str) -> ExpertLayout:
    gpt_oss = family == "gpt_oss"
    biases = [("w13_bias", (2 * WIDTH,)), ("w2_bias", (HIDDEN,))] if gpt_oss else []
    weights = [("w13_weight", (2 * WIDTH, HIDDEN)), ("w2_weight", (HIDDEN, WIDTH)), *biases]
    return ExpertLayout.pack((name, shape, torch.float32) for name, shape in weights)


def test_family_is_exact(family):
    name, folder = family
    sizes = sizes_by_safetensors(folder)
    model = describe(read_checkpoint(str(folder)))
    experts = {n for n in sizes if ".experts." in n or "put_linear." in n}
    assert model.weights.expert_bytes == sum(sizes[n] for n in experts)
    assert model.weights.dense_bytes == sum(sizes.values()) - model.weights.expert_bytes
    assert model.weights.unused_bytes == 0
    if name == "dense":
        assert (model.layers, model.top_k, model.expert_bytes) == ((), 0, 0)
        return
    moe_layers = LAYERS - 1 if name == "deepseek_v2" else LAYERS
    assert [layer.number for layer in model.layers] == list(range(LAYERS))[-moe_layers:]
    assert (model.num_experts, model.top_k) == (EXPERTS, TOP_K)
    assert model.expert_bytes == real_layout(name).num_bytes
    assert model.weights.expert_bytes == moe_layers * EXPERTS * model.expert_bytes


def test_row_is_that_of_a_real_engine(family):
    name, folder = family
    model = describe(read_checkpoint(str(folder)))
    config = MoeOffloadConfig(cache_fraction=0.25)
    engine = OffloadEngine(config, torch.device("cpu"))
    for layer in model.layers:
        spec = LayerSpec(layer.name, layer.num_experts, real_layout(name), Activation("silu"))
        engine.add_layer(spec)
        assert layer.row_bytes(4) == spec.layout.row_bytes
    demands = [LayerDemand(m.name, m.num_experts, m.row_bytes(4)) for m in model.layers]
    assert plan_budget(demands, config) == engine.plan()


def test_served_type_changes_rows_and_dense_weights(family):
    _, folder = family
    model = describe(read_checkpoint(str(folder)))
    assert model.weights.dense.num_bytes(element_size("auto")) * 2 == model.weights.dense_bytes
    assert model.weights.dense.num_bytes(element_size("float32")) == model.weights.dense_bytes
    for layer in model.layers:
        assert layer.total.num_bytes(element_size("half")) * 2 == layer.stored_bytes


def test_kv_cache_of_families(family):
    name, folder = family
    model = describe(read_checkpoint(str(folder)))
    heads = HIDDEN // 32
    kv_heads = {"olmoe": heads}.get(name, max(1, heads // 2))
    each = (512 + 64) if name == "deepseek_v2" else 2 * kv_heads * 32
    assert model.kv_cache.bytes_per_token(2) == LAYERS * each * 2
    windows = [layer.window for layer in model.kv_cache.layers]
    assert windows == ([32, None, 32, None] if name == "gpt_oss" else [None] * LAYERS)


def test_alignment_is_that_of_the_layout():
    assert plan_tensors.TENSOR_ALIGNMENT == TENSOR_ALIGNMENT
    assert plan_tensors.ROW_ALIGNMENT == ROW_ALIGNMENT


def stored(shapes: dict[str, tuple[str, tuple[int, ...]]]) -> tuple[StoredTensor, ...]:
    return tuple(
        StoredTensor(name, dtype, shape, math.prod(shape) * BITS[dtype] // 8)
        for name, (dtype, shape) in shapes.items()
    )


def write(folder: Path, config: dict, tensors: tuple[StoredTensor, ...], num_files: int) -> Path:
    """A checkpoint of real size whose files are holes: only the headers take space."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    per_file = math.ceil(len(tensors) / num_files)
    weight_map = {}
    for number in range(num_files):
        name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        end, header = 0, defaultdict(dict)
        header["__metadata__"] = {"format": "pt"}
        for tensor in tensors[number * per_file : (number + 1) * per_file]:
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape,
                                   "data_offsets": (end, end + tensor.num_bytes)}  # fmt: skip
            end += tensor.num_bytes
            weight_map[tensor.name] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def fp8(name: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A weight in blocks of 128 x 128 that share a scale."""
    blocks = (math.ceil(rows / 128), math.ceil(columns / 128))
    return {
        f"{name}.weight": ("F8_E4M3", (rows, columns)),
        f"{name}.weight_scale_inv": ("F32", blocks),
    }


DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 61,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def deepseek_v3() -> tuple[StoredTensor, ...]:
    """The experts and the larger dense weights of DeepSeek-V3, with its drafting layer 61."""
    shapes = {
        "model.embed_tokens.weight": ("BF16", (129280, 7168)),
        "lm_head.weight": ("BF16", (129280, 7168)),
    }
    for layer in range(62):
        prefix = f"model.layers.{layer}"
        shapes |= fp8(f"{prefix}.self_attn.o_proj", 7168, 16384)
        shapes[f"{prefix}.input_layernorm.weight"] = ("BF16", (7168,))
        if layer < 3:
            shapes |= fp8(f"{prefix}.mlp.down_proj", 7168, 18432)
            continue
        shapes[f"{prefix}.mlp.gate.weight"] = ("BF16", (256, 7168))
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = ("F32", (256,))
        for expert in ("shared_experts", *(f"experts.{number}" for number in range(256))):
            for part in ("gate_proj", "up_proj"):
                shapes |= fp8(f"{prefix}.mlp.{expert}.{part}", 2048, 7168)
            shapes |= fp8(f"{prefix}.mlp.{expert}.down_proj", 7168, 2048)
    return stored(shapes)


def test_deepseek_v3_in_fp8():
    tensors = deepseek_v3()
    model = describe(Checkpoint(Path(), DEEPSEEK_V3, tensors))
    expert = 3 * (2048 * 7168 + 16 * 56 * 4)
    assert model.expert_bytes == expert
    assert model.weights.expert_bytes == 59 * 256 * expert
    total = sum(tensor.num_bytes for tensor in tensors)
    assert model.weights.dense_bytes == total - 59 * 256 * expert
    drafting = sum(t.num_bytes for t in tensors if t.name.startswith("model.layers.61."))
    assert model.weights.unused_bytes == drafting
    assert model.weights.dense.num_bytes(2) == (
        model.weights.dense_bytes - (drafting - 256 * expert)
    )
    assert [layer.number for layer in model.layers] == list(range(3, 61))
    weights, scales = 3 * 2048 * 7168, 2 * 16 * 56 * 4 + 16 * 56 * 4
    row = model.layers[0].row_bytes(2)
    assert row % ROW_ALIGNMENT == 0
    assert weights + scales <= row < weights + scales + ROW_ALIGNMENT + 4 * TENSOR_ALIGNMENT
    assert model.layers[0].row_bytes(4) == row  # quantised weights are not cast
    assert model.kv_cache.bytes_per_token(2) == 61 * (512 + 64) * 2


def children_seconds() -> float:
    """Time on a processor, which does not depend on what else the machine does."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_hundreds_of_gigabytes_in_seconds(tmp_path):
    """By the real command, which must not import what is slow to import."""
    tensors = deepseek_v3()
    folder = write(tmp_path / "v3", DEEPSEEK_V3, tensors, 163)
    code = (
        "import sys\nfrom vllm_moe_offload import cli\n"
        "status = cli.main(sys.argv[1:])\n"
        "slow = {'torch', 'vllm', 'transformers', 'numpy', 'safetensors.torch'}\n"
        "print(sorted(slow & set(sys.modules)), file=sys.stderr)\nsys.exit(status)"
    )
    command = [sys.executable, "-c", code, "plan", str(folder), "--json", "--host-gb", "1000"]
    before = children_seconds()
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    seconds = children_seconds() - before
    assert (result.returncode, result.stderr) == (0, "[]\n")
    answer = json.loads(result.stdout)
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    headers = total - answer["dense_bytes"] - answer["expert_bytes"]
    assert answer["dense_bytes"] + answer["expert_bytes"] == sum(t.num_bytes for t in tensors)
    assert total > 600e9
    assert 0 < headers < 20e6
    assert answer["moe_layers"] == 58
    assert seconds < 5


GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072,
    "quantization_config": {"quant_method": "mxfp4"},
}


def gpt_oss() -> tuple[StoredTensor, ...]:
    shapes = {"model.embed_tokens.weight": ("BF16", (201088, 2880))}
    for layer in range(36):
        mlp = f"model.layers.{layer}.mlp"
        shapes |= {
            f"{mlp}.router.weight": ("BF16", (128, 2880)),
            f"{mlp}.router.bias": ("BF16", (128,)),
            f"{mlp}.experts.gate_up_proj_blocks": ("U8", (128, 5760, 90, 16)),
            f"{mlp}.experts.gate_up_proj_scales": ("U8", (128, 5760, 90)),
            f"{mlp}.experts.gate_up_proj_bias": ("BF16", (128, 5760)),
            f"{mlp}.experts.down_proj_blocks": ("U8", (128, 2880, 90, 16)),
            f"{mlp}.experts.down_proj_scales": ("U8", (128, 2880, 90)),
            f"{mlp}.experts.down_proj_bias": ("BF16", (128, 2880)),
        }
    return stored(shapes)


def test_gpt_oss_in_mxfp4():
    model = describe(Checkpoint(Path(), GPT_OSS, gpt_oss()))
    expert = (5760 + 2880) * (90 * 17 + 2)
    assert model.expert_bytes == expert
    assert model.weights.expert_bytes == 36 * 128 * expert
    assert model.weights.dense_bytes == 201088 * 2880 * 2 + 36 * (128 * 2880 + 128) * 2
    parts = (5760 * 1440, 5760 * 90, 5760 * 2, 2880 * 1440, 2880 * 90, 2880 * 2)
    row = sum(math.ceil(part / TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT for part in parts)
    assert model.layers[0].row_bytes(2) == math.ceil(row / ROW_ALIGNMENT) * ROW_ALIGNMENT
    assert model.kv_cache.bytes_per_token(2) == 36 * 2 * 8 * 64 * 2


def test_window_bounds_what_a_sequence_keeps():
    cache = describe(Checkpoint(Path(), GPT_OSS, gpt_oss())).kv_cache
    token = 2 * 8 * 64 * 2
    needed = cache.bytes_needed(4096, 3, step_tokens=2048, element_size=2)
    assert needed == 18 * token * 3 * 4096 + 18 * token * (3 * 128 + 2048)
    assert cache.bytes_needed(100, 1, step_tokens=2048, element_size=2) == 36 * token * 112


def gptq(name: str, rows: int, columns: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A 4-bit weight [rows, columns] in groups of 128, transposed and packed."""
    return {
        f"{name}.qweight": ("I32", (columns // 8, rows)),
        f"{name}.qzeros": ("I32", (columns // 128, rows // 8)),
        f"{name}.scales": ("F16", (columns // 128, rows)),
        f"{name}.g_idx": ("I32", (columns,)),
    }


QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 2,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},
}


def test_gptq():
    shapes = {"model.embed_tokens.weight": ("F16", (151936, 2048))}
    for layer in range(2):
        for expert in range(128):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            shapes |= gptq(f"{prefix}.gate_proj", 768, 2048) | gptq(f"{prefix}.up_proj", 768, 2048)
            shapes |= gptq(f"{prefix}.down_proj", 2048, 768)
    model = describe(Checkpoint(Path(), QWEN3, stored(shapes)))
    packed = 3 * 768 * 2048 // 2 + 3 * (16 * 96 * 4 + 16 * 768 * 2)
    assert model.expert_bytes == packed + (2 * 2048 + 768) * 4
    assert model.weights.dense_bytes == 151936 * 2048 * 2
    # Codes and scales of w13 and of w2: no row holds g_idx, nor zero points that are all alike.
    assert len(model.layers[0].row) == 4
    assert model.kv_cache.bytes_per_token(2) == 2 * 2 * 4 * 128 * 2
    assert model.kv_cache.layers[0].window is None


SMALL = {
    "num_hidden_layers": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
}


def small(*tensors: tuple[str, tuple[int, ...]], **config) -> Model:
    shapes = {name: ("BF16", shape) for name, shape in tensors}
    return describe(Checkpoint(Path(), SMALL | config, stored(shapes)))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.feed_forward.experts.gate_up_proj", (4, 8, 6)),  # Llama 4
        ("model.layers.1.mlp.experts.down_proj_bias", (4, 8)),
        ("transformer.blocks.1.ffn.experts.mlp.w1", (12, 8)),  # DBRX
        ("model.layers.1.block_sparse_moe.output_linear.weight", (4, 8, 3)),  # Granite
        ("model.layers.1.moe.gate_proj.weight", (4, 3, 8)),  # Step 3
        ("model.layers.1.moe.up_proj.weight_scale_inv", (4, 1, 1)),
        ("model.layers.1.mlp.experts.w2_scale", (4,)),
    ],
)
def test_stacked_experts(name, shape):
    model = small((name, shape), ("model.layers.1.input_layernorm.weight", (8,)))
    assert model.weights.expert_bytes == math.prod(shape) * 2
    assert model.weights.dense_bytes == 16
    assert (model.layers[0].number, model.num_experts) == (1, 4)
    assert model.expert_bytes == math.prod(shape) // 4 * 2


@pytest.mark.parametrize(
    "prefix",
    [
        "model.layers.3.block_sparse_moe.experts.{}.w1.weight",
        "backbone.layers.3.mixer.experts.{}.up_proj.weight",
        "model.language_model.layers.3.mlp.experts.{}.gate_proj.weight_packed",
        "decoder.layers.3.ffn.experts.expert_{}.fc1.weight",
    ],
)
def test_experts_one_by_one(prefix):
    names = [(prefix.format(expert), (3, 8)) for expert in range(4)]
    model = small(*names)
    assert (model.weights.dense_bytes, model.weights.expert_bytes) == (0, 4 * 48)
    assert model.layers[0].number == 3


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.mlp.shared_experts.down_proj.weight", (8, 4)),
        ("model.layers.1.mlp.shared_expert.gate_proj.weight", (4, 8)),
        ("model.layers.1.mlp.shared_expert_gate.weight", (1, 8)),
        ("model.layers.1.mlp.gate.weight", (4, 8)),
        ("model.layers.1.mlp.router.weight", (4, 8)),
        ("model.layers.1.moe.gate.weight", (4, 8)),
        ("model.layers.1.moe.router_bias", (4,)),
        ("model.layers.1.mlp.experts.gate.weight", (4, 8)),
        ("model.layers.1.mlp.experts.e_score_correction_bias", (4,)),
        ("model.layers.1.mlp.experts.norm.weight", (8,)),
        ("model.layers.1.block_sparse_moe.router.layer.weight", (4, 8)),
        ("model.layers.1.shared_mlp.input_linear.weight", (4, 8)),
        ("model.layers.1.mlp.up_proj.weight", (4, 8)),
    ],
)
def test_dense_tensors_of_moe_layers(name, shape):
    experts = ("model.layers.1.mlp.experts.gate_up_proj", (4, 8, 6))
    assert small(experts, (name, shape)).weights.dense_bytes == math.prod(shape) * 2


@pytest.mark.parametrize("prefix", ["model.layers.4.mlp", "mtp.layers.0.mlp", "talker.layers.0.m"])
def test_layers_that_are_not_loaded(prefix):
    used = ("model.layers.1.mlp.experts.gate_up_proj", (4, 8, 6))
    tower = ("vision_model.encoder.layers.9.mlp.weight", (5,))
    model = small(used, tower, (f"{prefix}.experts.gate_up_proj", (4, 8, 6)))
    assert model.weights.unused_bytes == 4 * 8 * 6 * 2
    assert model.weights.expert_bytes == 2 * 4 * 8 * 6 * 2
    assert model.weights.dense.num_bytes(2) == model.weights.dense_bytes == 10
    assert len(model.layers) == 1


def test_count_of_experts_without_config():
    stacked = ("model.layers.1.mlp.experts.gate_up_proj", (4, 8, 6))
    assert small(stacked, num_experts=None).num_experts == 4


def test_layers_of_several_sizes_are_in_order():
    wide = [
        (f"model.layers.{n}.mlp.experts.{e}.w1.weight", (n, 8)) for n in (10, 9) for e in (0, 1)
    ]
    model = small(*wide, num_experts=2, num_hidden_layers=12)
    assert [layer.number for layer in model.layers] == [9, 10]
    assert model.expert_bytes == 160
    assert model.weights.expert_bytes == 2 * (144 + 160)


def test_config_of_a_multimodal_model():
    text = {name: SMALL[name] for name in SMALL if name != "hidden_size"}
    config = {"hidden_size": 999, "text_config": text | {"hidden_size": 8, "dtype": None}}
    tensors = stored({"model.language_model.layers.0.mlp.experts.w1": ("BF16", (4, 8, 6))})
    model = describe(Checkpoint(Path(), config, tensors))
    assert (model.top_k, model.kv_cache.bytes_per_token(2)) == (2, 4 * 2 * 8 * 2)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"layer_types": ["linear_attention", "full_attention"] * 2}, [32, 32]),
        ({"full_attention_interval": 4}, [32]),
        ({"hybrid_override_pattern": "M*E-"}, [32]),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, [32, 32]),
        ({"attn_type_list": [0, 0, 0, 1]}, [32]),
        ({"linear_attn_config": {"full_attn_layers": [4]}}, [32]),
        ({"num_key_value_heads": 1, "head_dim": 16, "v_head_dim": 8}, [24 * 2] * 4),
        ({"sliding_window": 9, "sliding_window_pattern": 2, "swa_head_dim": 2,
          "num_key_value_heads": 1}, [8, 16, 8, 16]),
        ({"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2,
          "global_head_dim": 16, "num_global_key_value_heads": 1}, [32, 64, 32, 64]),
        ({"num_kv_shared_layers": 1}, [32] * 3),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_topk": 2048,
          "index_head_dim": 128}, [576 * 2 + 132] * 4),
    ],
)  # fmt: skip
def test_kv_cache_by_kind_of_layer(fields, kept):
    model = small(("model.layers.1.mlp.experts.gate_up_proj", (4, 8, 6)), **fields)
    sizes = [layer.elements * 2 + layer.other_bytes for layer in model.kv_cache.layers]
    assert sizes == kept
    assert model.kv_cache.state_layers == 4 - len(kept) - fields.get("num_kv_shared_layers", 0)


def test_expert_that_is_missing():
    names = [(f"model.layers.1.mlp.experts.{e}.w1.weight", (3, 8)) for e in (0, 1, 3)]
    with pytest.raises(OffloadError, match=r"the first is model\.layers\.1\.mlp\.experts\.2\.w1"):
        small(*names)


def test_experts_under_no_known_name():
    with pytest.raises(OffloadError, match="tells of 4 experts, but no tensor"):
        small(("model.layers.1.mlp.weight", (8, 8)))


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_experts_per_tok", "hidden_size"])
def test_field_that_is_missing(field):
    experts = ("model.layers.1.mlp.experts.gate_up_proj", (4, 8, 6))
    with pytest.raises(OffloadError, match=field):
        small(experts, **{field: None})
