"""Tiny random MoE checkpoints in real Hugging Face format, for the demo, tests and benchmarks.

`make_checkpoint` writes what a model on the hub has: config, generation config, a working
tokenizer with a chat template, and safetensors shards with an index, in which the experts have
the names and shapes that the family's published checkpoints use.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCAB_SIZE = 512
PAD, BOS, EOS = "<pad>", "<s>", "</s>"  # token ids 0, 1, 2

_MAX_POSITIONS = 4096


@dataclass(frozen=True)
class _Shape:
    """The sizes that all families share."""

    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int

    @property
    def head_dim(self) -> int:
        """A quarter of the hidden size, within 32 and 128: what attention kernels support."""
        return max(32, min(128, self.hidden_size // 4))

    @property
    def num_heads(self) -> int:
        """As many heads as make the hidden size."""
        return self.hidden_size // self.head_dim


@dataclass(frozen=True)
class _Family:
    """How one architecture names the common sizes, and what it adds to them."""

    config_class: str
    expert_count: str | None  # config fields
    expert_width: str
    extra: Callable[[_Shape], dict[str, Any]] = lambda _: {}


# What is set here differs from transformers' defaults so that a wrong reading of the config
# shows in the output: scaling factors are not 1, biases are on, top-k is grouped.
_FAMILIES = {
    "mixtral": _Family("MixtralConfig", "num_local_experts", "intermediate_size"),
    "qwen2_moe": _Family(
        "Qwen2MoeConfig",
        "num_experts",
        "moe_intermediate_size",
        lambda s: {
            "intermediate_size": 4 * s.intermediate_size,
            "shared_expert_intermediate_size": 2 * s.intermediate_size,
        },
    ),
    "qwen3_moe": _Family(
        "Qwen3MoeConfig",
        "num_experts",
        "moe_intermediate_size",
        lambda s: {
            "intermediate_size": 4 * s.intermediate_size,
            "head_dim": s.head_dim,
            "norm_topk_prob": True,
        },
    ),
    "olmoe": _Family(
        "OlmoeConfig",
        "num_experts",
        "intermediate_size",
        lambda s: {"num_key_value_heads": s.num_heads},
    ),
    # The latent attention has its real dimensions: MLA kernels are made for no others.
    "deepseek_v2": _Family(
        "DeepseekV2Config",
        "n_routed_experts",
        "moe_intermediate_size",
        lambda s: {
            "intermediate_size": 4 * s.intermediate_size,
            "first_k_dense_replace": 1,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "num_key_value_heads": s.num_heads,
        },
    ),
    "gpt_oss": _Family(
        "GptOssConfig",
        "num_local_experts",
        "intermediate_size",
        lambda s: {
            "head_dim": s.head_dim,
            "sliding_window": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": _MAX_POSITIONS // 4,
                "rope_theta": 150000.0,
            },
        },
    ),
    "granite_moe": _Family(
        "GraniteMoeConfig",
        "num_local_experts",
        "intermediate_size",
        lambda s: {
            "embedding_multiplier": 1.5,
            "attention_multiplier": 2.0 / s.head_dim,
            "residual_multiplier": 0.5,
            "logits_scaling": 0.75,
            "tie_word_embeddings": True,
        },
    ),
    "dense": _Family("Qwen3Config", None, "intermediate_size", lambda s: {"head_dim": s.head_dim}),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
MOE_FAMILIES: tuple[str, ...] = tuple(n for n, f in _FAMILIES.items() if f.expert_count)


def make_checkpoint(
    path: Path,
    family: str,
    *,
    dtype: str = "float32",
    num_layers: int = 4,
    num_experts: int = 8,
    top_k: int = 2,
    hidden_size: int = 128,
    intermediate_size: int = 64,
    num_shards: int = 3,
    seed: int = 0,
    config_overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Write a random checkpoint of `family` into the folder `path` and return `path`.

    The same arguments give the same files, and another `dtype` gives the same weights rounded.
    `intermediate_size` is the width of one routed expert. The weights are cut into `num_shards`
    files or a few more, since a tensor is never split. `config_overrides` replaces fields of
    the transformers config; the vocabulary of the tokenizer stays `VOCAB_SIZE`. deepseek_v2
    chooses from 2 of 4 groups, so `top_k` may be at most half of `num_experts`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    shape = _Shape(num_layers, num_experts, top_k, hidden_size, intermediate_size)
    config = _config(family, shape, config_overrides or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise_constants(model, config.initializer_range)
    model = model.to(getattr(torch, dtype))

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    # save_pretrained undoes the fusing of experts that transformers does when it loads.
    model.save_pretrained(path, max_shard_size=math.ceil(size / num_shards))
    _name_experts_as_on_the_hub(path / "config.json", _FAMILIES[family])
    _tokenizer().save_pretrained(path)
    return path


def _config(family: str, shape: _Shape, overrides: Mapping[str, Any]) -> Any:
    import transformers

    if family not in _FAMILIES:
        raise ValueError(f"unknown family {family!r}: choose from {', '.join(FAMILIES)}")
    spec = _FAMILIES[family]
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": max(1, shape.num_heads // 2),
        "max_position_embeddings": _MAX_POSITIONS,
        # Spreads the logits, so that a greedy choice is never a tie.
        "initializer_range": round(1.7 / math.sqrt(shape.hidden_size), 4),
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        spec.expert_width: shape.intermediate_size,
    }
    if spec.expert_count:
        fields |= {spec.expert_count: shape.num_experts, "num_experts_per_tok": shape.top_k}
    fields |= spec.extra(shape)
    return getattr(transformers, spec.config_class)(**fields | dict(overrides))


def _randomise_constants(model: Any, std: float) -> None:
    """Give biases and norms, which start as zeros and ones, values that are missed if ignored."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_up_proj_bias"):
                parameter.normal_(std=4.0)  # so that some sums pass the limit of gpt_oss, 7
            elif name.endswith("bias"):
                parameter.normal_(std=std)
            elif "norm" in name:
                parameter.normal_(mean=1.0, std=0.1)


def _name_experts_as_on_the_hub(config_file: Path, family: _Family) -> None:
    """Undo the new name that transformers gives to some families' number of experts."""
    config = json.loads(config_file.read_text())
    if family.expert_count and family.expert_count not in config:
        config[family.expert_count] = config.pop("num_local_experts")
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ bos_token + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)

_CORPUS = """
A mixture of experts replaces the feed-forward network of a transformer by many smaller ones and a
router. For every token the router scores the experts, keeps the best few, and adds up what they
return, weighted by their scores. Only a small part of the parameters is used for one token, so such
a model computes little for its size; but all of its experts have to be stored somewhere, and most
of them do not fit into the memory of one accelerator. Offloading keeps them in the memory of the
host and copies an expert to the device when a token asks for it. Copies are slow, therefore recent
experts stay in a cache, and good guesses about the next layers start their transfers early.
What is the capital of France? Write a short story about a lighthouse keeper who finds a message.
user system assistant def return import class for while if else True False None 0 1 2 3 4 5 6 7 8 9
"""


def save_tokenizer(path: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Write the tokenizer of these checkpoints into the folder `path`.

    Beyond `VOCAB_SIZE`, token n is the word `w<n>`, which no text is encoded to: every id that a
    random model of a large vocabulary generates has a text of its own.
    """
    _tokenizer(vocab_size).save_pretrained(path)


def _tokenizer(vocab_size: int = VOCAB_SIZE) -> Any:
    """Train a byte-level BPE tokenizer of `VOCAB_SIZE` tokens on the text above, and pad it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_CORPUS.strip().splitlines(), trainer)
    trained = json.loads(bpe.to_str())
    # "\u0120" is how byte-level BPE writes a space.
    trained["model"]["vocab"] |= {f"\u0120w{n}": n for n in range(VOCAB_SIZE, vocab_size)}
    bpe = Tokenizer.from_str(json.dumps(trained))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=_MAX_POSITIONS,
    )
