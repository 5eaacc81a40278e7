"""Models of real shapes without weights, for ``--load-format dummy``."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path


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

    @property
    def expert_bytes(self) -> int:
        """Bytes of one 16-bit expert."""
        return 3 * self.hidden * self.intermediate * 2

    @property
    def pool_bytes(self) -> int:
        """Bytes of all experts."""
        return self.num_layers * self.num_experts * self.expert_bytes

    def write(self, folder: Path) -> Path:
        """Write the configuration that vLLM reads."""
        config = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "num_hidden_layers": self.num_layers,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "norm_topk_prob": True,
            "hidden_size": self.hidden,
            "moe_intermediate_size": self.intermediate,
            "intermediate_size": 3 * self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 65_536,
            "rope_theta": 1_000_000.0,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "tie_word_embeddings": False,
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder

    def as_dict(self) -> dict[str, int]:
        """All sizes by name."""
        return asdict(self)


SHAPES = {
    "qwen3-30b-a3b-16": Shape(16, 128, 8, 2048, 768, 32, 4),
    "qwen3-30b-a3b": Shape(48, 128, 8, 2048, 768, 32, 4),
    "mixtral-8x7b-4": Shape(4, 8, 2, 4096, 14_336, 32, 8, vocabulary=32_000),
    # For trying the benchmarks out where there is no GPU.
    "tiny": Shape(4, 16, 4, 128, 64, 4, 2, head_dim=32, vocabulary=512),
}
