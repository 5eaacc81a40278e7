"""Models of real shapes whose experts are quantised, without weights.

Qwen3-30B-A3B with 16 layers in fp8 blocks and in 4-bit groups of 128, gpt-oss-120b with 12 layers
in MXFP4.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

from shapes import Shape

_GATES = "re:.*mlp.gate$"


@dataclass(frozen=True)
class QuantShape(Shape):
    """A model whose experts are stored in a format.

    ``backends`` are those of stock vLLM that may be its fastest on some machine.
    """

    quantization: dict[str, Any] = field(default_factory=dict)
    backends: tuple[str, ...] = ("auto",)
    bits_per_weight: float = 8.0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as the checkpoint stores it."""
        return int(3 * self.hidden * self.intermediate * self.bits_per_weight / 8)

    def _config(self) -> dict[str, Any]:
        return {**super()._config(), "quantization_config": self.quantization}


@dataclass(frozen=True)
class GptOssShape(QuantShape):
    """A gpt-oss model, whose experts have 16-bit biases."""

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as the checkpoint stores it."""
        return super().expert_bytes + 2 * (2 * self.intermediate + self.hidden)

    def _config(self) -> dict[str, Any]:
        kinds = ("sliding_attention", "full_attention")
        return {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "dtype": "bfloat16",
            "num_hidden_layers": self.num_layers,
            "num_local_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "layer_types": [kinds[layer % 2] for layer in range(self.num_layers)],
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "max_position_embeddings": 131_072,
            "rope_theta": 150_000.0,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "truncate": False, "original_max_position_embeddings": 4096,
            },
            "quantization_config": self.quantization,
        }  # fmt: skip


def _fp8(layers: int) -> dict[str, Any]:
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(layers)]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", *gates],
    }


def _all_but_experts(layers: int) -> list[str]:
    parts = ("mlp.gate", *(f"self_attn.{part}_proj" for part in "qkvo"))
    return ["lm_head", *(f"model.layers.{n}.{part}" for n in range(layers) for part in parts)]


def _w4a16(group: int, *ignored: str) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": group, "dynamic": False}  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None,
                        "output_activations": None},
        },
        "ignore": ["lm_head", _GATES, *ignored],
    }  # fmt: skip


_MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip
_QWEN = (16, 128, 8, 2048, 768, 32, 4)

QUANT_SHAPES: dict[str, QuantShape] = {
    "qwen3-30b-a3b-16-fp8": QuantShape(
        *_QWEN, quantization=_fp8(16), backends=("auto", "triton"),
        bits_per_weight=8 + 32 / 128**2,
    ),
    "qwen3-30b-a3b-16-w4a16": QuantShape(
        *_QWEN, quantization=_w4a16(128), backends=("auto", "triton"),
        bits_per_weight=4 + 16 / 128,
    ),
    "gpt-oss-120b-12-mxfp4": GptOssShape(
        12, 128, 4, 2880, 2880, 64, 8, head_dim=64, vocabulary=201_088, quantization=_MXFP4,
        backends=("auto", "marlin"), bits_per_weight=4 + 8 / 32,
    ),
    # For trying the suite out where there is no GPU.
    "tiny-fp8": QuantShape(
        2, 16, 4, 128, 128, 4, 2, head_dim=32, vocabulary=512,
        quantization={**_fp8(2), "modules_to_not_convert": _all_but_experts(2)},
    ),
    "tiny-w4a16": QuantShape(
        2, 16, 4, 128, 64, 4, 2, head_dim=32, vocabulary=512,
        quantization=_w4a16(32, "re:.*self_attn.*"), bits_per_weight=4 + 16 / 32,
    ),
    "tiny-mxfp4": GptOssShape(
        2, 16, 4, 128, 128, 4, 2, head_dim=32, vocabulary=512, quantization=_MXFP4,
        bits_per_weight=4 + 8 / 32,
    ),
}  # fmt: skip
