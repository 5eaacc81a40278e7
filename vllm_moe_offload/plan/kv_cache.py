"""Bytes of KV cache a token, by the kind of attention that each layer has."""

from dataclasses import dataclass

from vllm_moe_offload.plan.hf_config import HfConfig

_HEADS = ("num_attention_heads", "n_heads", "n_head")
_KV_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num",
    "num_attention_groups",
)  # fmt: skip
_HIDDEN = ("hidden_size", "d_model", "n_embd")

_INDEXER_BLOCK = 128
"""Elements of DeepSeek's sparse indexer that share a scale of four bytes."""

BLOCK_TOKENS = 16
"""Tokens of a block of KV cache, vLLM's default."""

FULL, SLIDING, STATE = "full", "sliding", "state"


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a token: elements of the served type, and bytes of another.

    ``window`` is the number of tokens after which a layer forgets, None if it never does.
    """

    elements: int
    other_bytes: int = 0
    window: int | None = None


@dataclass(frozen=True)
class KvCache:
    """What all layers keep of a token; ``state_layers`` keep a fixed state a sequence instead."""

    layers: tuple[LayerCache, ...]
    state_layers: int

    @property
    def why_not_shared(self) -> str | None:
        """What in the model keeps experts from borrowing this cache, None if nothing does.

        The attention backend and other options may still, as vLLM tells when it serves.
        """
        if self.state_layers or any(layer.window for layer in self.layers):
            return "not all layers have full attention"
        if len({(layer.elements, layer.other_bytes) for layer in self.layers}) > 1:
            return "the layers' caches differ in size"
        return None

    def bytes_per_token(self, element_size: int) -> int:
        """Bytes of one token in all layers, while it is in every window."""
        return sum(layer.elements * element_size + layer.other_bytes for layer in self.layers)

    def bytes_needed(
        self, num_tokens: int, num_sequences: int, *, step_tokens: int, element_size: int
    ) -> int:
        """Bytes for sequences of this many tokens each.

        Args:
            num_tokens: of a sequence, prompt and answer together.
            num_sequences: running at once.
            step_tokens: most tokens that one step adds before a window moves on.
            element_size: bytes of an element of the served type.
        """
        total = 0
        for layer in self.layers:
            held = min(num_tokens, layer.window or num_tokens)
            tokens = num_sequences * _whole_blocks(held)
            if held < num_tokens:
                tokens += _whole_blocks(min(step_tokens, num_tokens - held))
            total += tokens * (layer.elements * element_size + layer.other_bytes)
        return total


def kv_cache(config: HfConfig) -> KvCache:
    """Read the attention of all layers.

    Raises:
        OffloadError: the config lacks a field.
    """
    kinds = layer_kinds(config)
    layers = [_layer(config, number, kind) for number, kind in enumerate(kinds) if kind != STATE]
    return KvCache(tuple(layers), kinds.count(STATE))


def _layer(config: HfConfig, number: int, kind: str) -> LayerCache:
    window = config.count("sliding_window") if kind == SLIDING else None
    if rank := config.count("kv_lora_rank"):
        return LayerCache(rank + config.count("qk_rope_head_dim"), _indexer_bytes(config), window)
    prefixes = ("swa_{}",) if kind == SLIDING else ("global_{}", "num_global_{}")
    heads = _own(config, prefixes, _KV_HEADS, number) or config.require(*_HEADS)
    head_dim = _own(config, prefixes, ("head_dim", "hidden_size_per_head"), number)
    head_dim = head_dim or config.require(*_HIDDEN) // config.require(*_HEADS)
    value_dim = _own(config, prefixes, ("v_head_dim",), number) or head_dim
    return LayerCache(heads * (head_dim + value_dim), 0, window)


def _own(config: HfConfig, prefixes: tuple[str, ...], names: tuple[str, ...], number: int) -> int:
    """A field of this kind of layer, else the one of all layers; 0 if there is none."""
    special = [form.format(name.removeprefix("num_") if "num" in form else name)
               for form in prefixes for name in names]  # fmt: skip
    value = config.get(*special, *names)
    if isinstance(value, list):
        value = value[number] if number < len(value) else None
    return value if isinstance(value, int) else 0


def _indexer_bytes(config: HfConfig) -> int:
    if not config.get("index_topk"):
        return 0
    size = config.count("index_head_dim")
    return size + size // _INDEXER_BLOCK * 4


def layer_kinds(config: HfConfig) -> list[str]:
    """Tell of every decoder layer whether it keeps all tokens, a window of them, or a state."""
    layers = range(config.num_layers)
    has_window = config.count("sliding_window") > 0
    if types := config.get("layer_types", "layers_block_type"):
        kinds = [_kind(str(name), has_window) for name in types[: len(layers)]]
    elif (attention := _attention_layers(config)) is not None:
        kinds = [FULL if i in attention else STATE for i in layers]
    elif has_window and config.get("use_sliding_window") is not False:
        kinds = [SLIDING if _slides(config, i) else FULL for i in layers]
    else:
        kinds = [FULL for _ in layers]
    shared = config.count("num_kv_shared_layers")  # the last layers read an earlier layer's cache
    return kinds[: len(kinds) - shared]


def _kind(name: str, has_window: bool) -> str:
    if "sliding" in name and has_window:
        return SLIDING
    is_state = any(word in name for word in ("linear", "mamba", "conv", "recurrent", "moe", "mlp"))
    return STATE if is_state else FULL


def _attention_layers(config: HfConfig) -> set[int] | None:
    """Layers with attention in a model that mixes it with something else, None otherwise."""
    layers = range(config.num_layers)
    linear = config.get("linear_attn_config")
    if isinstance(linear, dict) and "full_attn_layers" in linear:
        return {number - 1 for number in linear["full_attn_layers"]}
    if (numbers := config.get("attn_layer_indices", "full_attn_idxs")) is not None:
        return set(numbers)
    if (kinds := config.get("hybrid_override_pattern", "attn_type_list")) is not None:
        return {i for i, kind in enumerate(kinds) if kind in ("*", 1)}
    if period := config.count("attn_layer_period"):
        return {i for i in layers if i % period == config.count("attn_layer_offset")}
    if interval := config.count("full_attention_interval"):
        return {i for i in layers if (i + 1) % interval == 0}
    return None


def _slides(config: HfConfig, layer: int) -> bool:
    if pattern := config.count("sliding_window_pattern"):
        return (layer + 1) % pattern != 0
    if config.get("use_sliding_window"):
        return layer >= config.count("max_window_layers")
    return True


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
