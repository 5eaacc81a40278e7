"""Models of real shapes without weights, for ``--load-format dummy``."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE model: its experts, and the attention around them."""

    num_layers: int
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocabulary: int = 151_936
    positions: int = 65_536

    @property
    def moe_layers(self) -> int:
        """Layers that have experts."""
        return self.num_layers

    @property
    def expert_bytes(self) -> int:
        """Bytes of one 16-bit expert."""
        return 3 * self.hidden * self.intermediate * 2

    @property
    def pool_bytes(self) -> int:
        """Bytes of all experts."""
        return self.moe_layers * self.num_experts * self.expert_bytes

    def write(self, folder: Path) -> Path:
        """Write the configuration that vLLM reads."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self._config(), indent=1))
        return folder

    def as_dict(self) -> dict[str, int]:
        """All sizes by name."""
        return asdict(self)

    def _config(self) -> dict[str, Any]:
        return {
            **self._common(),
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_experts": self.num_experts,
            "norm_topk_prob": True,
            "intermediate_size": 3 * self.hidden,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def _common(self) -> dict[str, Any]:
        return {
            "dtype": "bfloat16",
            "num_hidden_layers": self.num_layers,
            "num_experts_per_tok": self.top_k,
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }


@dataclass(frozen=True)
class LatentShape(Shape):
    """A DeepSeek-V2 model: latent attention, shared experts, a first layer without experts."""

    shared_experts: int = 2
    dense_intermediate: int = 10_944
    kv_lora_rank: int = 512
    rope_head_dim: int = 64

    @property
    def moe_layers(self) -> int:
        """All layers but the first."""
        return self.num_layers - 1

    def _config(self) -> dict[str, Any]:
        return {
            **self._common(),
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "n_routed_experts": self.num_experts,
            "n_shared_experts": self.shared_experts,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "intermediate_size": self.dense_intermediate,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "num_key_value_heads": self.kv_heads,
            "q_lora_rank": None,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_nope_head_dim": self.head_dim,
            "qk_rope_head_dim": self.rope_head_dim,
            "v_head_dim": self.head_dim,
        }


SHAPES: dict[str, Shape] = {
    "qwen3-30b-a3b-8": Shape(8, 128, 8, 2048, 768, 32, 4),
    "qwen3-30b-a3b-16": Shape(16, 128, 8, 2048, 768, 32, 4),
    "qwen3-30b-a3b": Shape(48, 128, 8, 2048, 768, 32, 4),
    # With as many choices as its recorded trace has.
    "qwen3-30b-a3b-top6": Shape(48, 128, 6, 2048, 768, 32, 4),
    "qwen3-30b-a3b-16-top6": Shape(16, 128, 6, 2048, 768, 32, 4),
    "mixtral-8x7b-4": Shape(4, 8, 2, 4096, 14_336, 32, 8, vocabulary=32_000),
    "deepseek-v2-lite": LatentShape(27, 64, 6, 2048, 1408, 16, 16, vocabulary=102_400),
    # For trying the benchmarks out where there is no GPU.
    "tiny": Shape(4, 16, 4, 128, 64, 4, 2, head_dim=32, vocabulary=512),
    "tiny-latent": LatentShape(
        3, 16, 4, 128, 64, 2, 2, vocabulary=512, dense_intermediate=256
    ),
}  # fmt: skip
