"""A checkpoint of random weights in a real shape, written as fast as the disk takes it."""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shapes import Shape

from vllm_moe_offload.checkpoints import save_tokenizer
from vllm_moe_offload.errors import OffloadError

Sizes = tuple[int, ...]

_SLACK = 1 << 22
"""Random values beyond the largest tensor, within which tensors begin at different places."""

_DRAWN = (1 << 24) + 3
"""Random values that are drawn; longer tensors repeat them, never row for row as it is odd."""

_WRITERS = min(8, len(os.sched_getaffinity(0)))
"""Files written at once; each is in memory meanwhile."""


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, Sizes]]:
    """Name and sizes of every tensor, layer by layer, as published checkpoints have them.

    Args:
        config: the Hugging Face configuration of a qwen3_moe or deepseek_v2 model.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    latent = config["model_type"] == "deepseek_v2"
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        attention = _latent_attention(config) if latent else _attention(config)
        for name, sizes in attention.items():
            yield f"{prefix}.self_attn.{name}.weight", sizes
        if layer < config.get("first_k_dense_replace", 0):
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        else:
            yield from _experts(f"{prefix}.mlp", config)


def _attention(config: Mapping[str, Any]) -> dict[str, Sizes]:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    projections = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    return {**projections, "o_proj": (hidden, queries), "q_norm": (head,), "k_norm": (head,)}


def _latent_attention(config: Mapping[str, Any]) -> dict[str, Sizes]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    return {
        "q_proj": (heads * (nope + rope), hidden),
        "kv_a_proj_with_mqa": (rank + rope, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (hidden, heads * value),
    }


def _experts(prefix: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Sizes]]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    count = config.get("num_experts") or config["n_routed_experts"]
    yield f"{prefix}.gate.weight", (count, hidden)
    for expert in range(count):
        yield from _mlp(f"{prefix}.experts.{expert}", hidden, width)
    if shared := config.get("n_shared_experts"):
        yield from _mlp(f"{prefix}.shared_experts", hidden, shared * width)


def _mlp(prefix: str, hidden: int, width: int) -> Iterator[tuple[str, Sizes]]:
    yield f"{prefix}.gate_proj.weight", (width, hidden)
    yield f"{prefix}.up_proj.weight", (width, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, width)


def config_of(shape: Shape, dtype: str, folder: Path) -> dict[str, Any]:
    """Write the configuration of a shape and return it."""
    shape.write(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= {"dtype": dtype, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    file.write_text(json.dumps(config, indent=1))
    return config


def checkpoint_bytes(config: Mapping[str, Any], item_bytes: int) -> int:
    """Size of all tensors."""
    return sum(math.prod(sizes) for _, sizes in tensors(config)) * item_bytes


def make(shape: Shape, dtype: str, folder: Path, *, disk_bytes: int, copies: int = 1) -> Path:
    """Write a checkpoint of random weights with its tokenizer.

    All tensors are pieces of one random sequence that begin at different places: they differ from
    each other, and cost little more than copying.

    Args:
        shape: its sizes.
        dtype: ``bfloat16`` or ``float32``.
        folder: where to.
        disk_bytes: what it may take.
        copies: how many of its size there will be, with those that other formats need.

    Raises:
        OffloadError: it is larger than that.
    """
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape, dtype, folder)
    kind = getattr(torch, dtype)
    needed = copies * checkpoint_bytes(config, kind.itemsize)
    if needed > disk_bytes:
        raise OffloadError(
            "--disk-gb", f"{disk_bytes / 1e9:.0f}",
            f"the checkpoint{' and its copy' * (copies - 1)} would take {needed / 1e9:.0f} GB",
            "Raise it if the disk has room, or choose a smaller --shape",
        )  # fmt: skip
    shards = _shards(config)
    deviation = 1.7 / math.sqrt(config["hidden_size"])  # spreads the logits: no ties
    longest = max(math.prod(sizes) for shard in shards for _, sizes in shard)
    source = torch.Generator().manual_seed(0)
    drawn = torch.empty(_DRAWN).normal_(0, deviation, generator=source).to(kind)
    values = drawn.repeat(-(-(longest + _SLACK) // _DRAWN))
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(lambda n: _write(folder, n, shards, values, deviation), range(len(shards))))
    _write_index(folder, shards, needed // copies)
    save_tokenizer(folder, shape.vocabulary)
    return folder


def _shards(config: Mapping[str, Any]) -> list[list[tuple[str, Sizes]]]:
    """One file a layer, and one for what is in none."""
    by_file: dict[str, list[tuple[str, Sizes]]] = {}
    for name, sizes in tensors(config):
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        by_file.setdefault(part, []).append((name, sizes))
    return list(by_file.values())


def _file_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write(
    folder: Path, number: int, shards: Sequence[Sequence[tuple[str, Sizes]]], values: Any,
    deviation: float,
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    file = folder / _file_name(number, len(shards))
    content = {name: _piece(name, sizes, values, deviation) for name, sizes in shards[number]}
    save_file(content, file, metadata={"format": "pt"})


def _piece(name: str, sizes: Sizes, values: Any, deviation: float) -> Any:
    begin = zlib.crc32(name.encode()) % _SLACK
    piece = values[begin : begin + math.prod(sizes)].view(sizes)
    return 1 + piece * (0.1 / deviation) if "norm" in name else piece.clone()


def _write_index(
    folder: Path, shards: Sequence[Sequence[tuple[str, Sizes]]], total_bytes: int
) -> None:
    files = {
        name: _file_name(number, len(shards))
        for number, shard in enumerate(shards)
        for name, _ in shard
    }
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
