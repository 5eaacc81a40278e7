"""A checkpoint as the planner sees it: weights, experts, KV cache."""

from dataclasses import dataclass

from vllm_moe_offload.checkpoint_check import missing_expert_tensors
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.plan.checkpoint import Checkpoint
from vllm_moe_offload.plan.hf_config import EXPERTS, TOP_K, HfConfig
from vllm_moe_offload.plan.kv_cache import KvCache, kv_cache
from vllm_moe_offload.plan.tensors import (
    FLOATS,
    MoeLayer,
    Weights,
    is_unused,
    left_out_of_rows,
    sort_tensors,
)

_ELEMENT_SIZES = {"float32": 4, "float": 4}


@dataclass(frozen=True)
class Model:
    """What a plan needs to know of a checkpoint.

    ``top_k`` is 0 for a dense model; ``max_positions`` is the longest sequence as the config has
    it, 0 if unknown; ``quantization`` is None for plain weights.
    """

    architecture: str
    weights: Weights
    top_k: int
    kv_cache: KvCache
    max_positions: int
    quantization: str | None
    has_scaled_positions: bool = False
    """Whether vLLM may allow more positions than ``max_positions``."""

    @property
    def length_limit(self) -> int:
        """The longest sequence that vLLM allows, 0 if it is not known."""
        return 0 if self.has_scaled_positions else self.max_positions

    @property
    def layers(self) -> tuple[MoeLayer, ...]:
        """The layers with routed experts, in order."""
        return self.weights.layers

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer, 0 for a dense model."""
        return max((layer.num_experts for layer in self.layers), default=0)

    @property
    def expert_bytes(self) -> int:
        """Bytes of the largest expert as stored, 0 for a dense model."""
        return max((layer.expert_bytes for layer in self.layers), default=0)


def element_size(dtype: str) -> int:
    """Bytes of an element of the type that vLLM serves in; ``auto`` never is a 32-bit type."""
    return _ELEMENT_SIZES.get(dtype, 2)


def describe(checkpoint: Checkpoint) -> Model:
    """Interpret a checkpoint.

    Raises:
        OffloadError: the config lacks a field, or the files lack experts.
    """
    config = HfConfig(checkpoint.config)
    quantization = config.quantization or _stored_quantised(checkpoint)
    weights = sort_tensors(
        checkpoint.tensors,
        num_experts=config.count(*EXPERTS) if config.count(*EXPERTS) > 1 else 0,
        num_layers=config.num_layers,
        is_quantised=quantization is not None,
        left_out=left_out_of_rows(config.quantization_config),
    )
    _check_experts(checkpoint, config, weights)
    names = checkpoint.config.get("architectures") or ["unknown architecture"]
    top_k = config.require(*TOP_K) if weights.layers else 0
    _check_choices(top_k, weights)
    return Model(
        architecture=str(names[0]),
        weights=weights,
        top_k=top_k,
        kv_cache=kv_cache(config),
        max_positions=config.count("max_position_embeddings", "max_seq_len", "n_positions"),
        quantization=quantization,
        has_scaled_positions=config.has_scaled_positions,
    )


def _check_choices(top_k: int, weights: Weights) -> None:
    least = min((layer.num_experts for layer in weights.layers), default=top_k)
    if top_k > least:
        raise OffloadError(
            "config.json",
            f"{top_k} experts a token",
            f"a layer has only {least}",
            "Compare it with the checkpoint's own; vLLM cannot serve this one",
        )


def _stored_quantised(checkpoint: Checkpoint) -> str | None:
    """Name a type of the weights that is no plain float, if the config names no format."""
    dtypes = {tensor.dtype for tensor in checkpoint.tensors if len(tensor.shape) >= 2}
    return next((d for d in sorted(dtypes) if d not in FLOATS and d[0] in "FUI"), None)


def _check_experts(checkpoint: Checkpoint, config: HfConfig, weights: Weights) -> None:
    num_experts = config.count(*EXPERTS)
    if num_experts > 1 and not weights.layers:
        raise OffloadError(
            "checkpoint",
            checkpoint.folder,
            f"its config tells of {num_experts} experts, but no tensor has an expert's name",
            "Use the checkpoint as its authors published it; adapters alone cannot be planned",
        )
    names = (tensor.name for tensor in checkpoint.tensors)
    used = (name for name in names if not is_unused(name, config.num_layers))
    if missing := missing_expert_tensors(used, num_experts):
        raise OffloadError(
            "checkpoint",
            checkpoint.folder,
            f"{len(missing)} expert tensors are missing, the first is {missing[0]}",
            "Download the checkpoint again or repair it",
        )
