"""What a model's ``config.json`` says of its language model, under the names of all families."""

from collections.abc import Mapping
from typing import Any

from vllm_moe_offload.errors import OffloadError

_NESTED = (
    "text_config", "llm_config", "language_config", "thinker_config", "decoder", "generator"
)  # fmt: skip
"""Where multimodal configs keep the language model's part."""

_PARTS = ("ffn_config", "attn_config")
"""Where DBRX keeps the fields that others have at the top."""

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts",
    "moe_k", "num_selected_experts", "top_k",
)  # fmt: skip


class HfConfig:
    """The fields of the language model, looked up under several names.

    Args:
        config: the whole of ``config.json``.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.fields = _flatten(config)

    def get(self, *names: str) -> Any:
        """Return the first of these fields that is set, or None."""
        values = (self.fields.get(name) for name in names)
        return next((value for value in values if value is not None), None)

    def count(self, *names: str) -> int:
        """Return a number, of a list the largest, and 0 if none of the fields is set."""
        value = self.get(*names)
        if isinstance(value, list):
            value = max(value, default=0)
        return value if isinstance(value, int) else 0

    def require(self, *names: str) -> int:
        """Return a number that the plan cannot do without.

        Raises:
            OffloadError: no field has it.
        """
        if value := self.count(*names):
            return value
        raise OffloadError(
            "config.json", names[0], "the field is missing or no number", "Add it to the config"
        )

    @property
    def num_layers(self) -> int:
        """Decoder layers, draft layers excluded."""
        return self.require(*LAYERS)

    @property
    def has_scaled_positions(self) -> bool:
        """Whether rotary positions are stretched, by which vLLM allows longer sequences."""
        found = [self.get(name) for name in ("rope_scaling", "rope_parameters")]
        return any("factor" in repr(rope) for rope in found)

    @property
    def quantization_config(self) -> Mapping[str, Any]:
        """What the config says on quantised weights, empty for plain ones."""
        found = self.get("quantization_config", "compression_config")
        return found if isinstance(found, Mapping) else {}

    @property
    def quantization(self) -> str | None:
        """Method by which the weights are quantised, None for plain weights."""
        found = self.quantization_config
        if not found:
            return None
        return str(found.get("quant_method") or found.get("quant_algo") or "unknown")


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in config.items() if value is not None}
    for name in _PARTS:
        if isinstance(part := own.get(name), Mapping):
            own = {**part, **own}
    for name in _NESTED:
        if isinstance(part := own.get(name), Mapping):
            return {**own, **_flatten(part)}
    return own
