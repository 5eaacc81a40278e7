"""Bytes of one expert of models that are often traced, when nobody gives them."""

import re
from dataclasses import dataclass

from vllm_moe_offload.sizes import MIB


@dataclass(frozen=True)
class ExpertShape:
    """Three matrices of hidden x intermediate (gate, up, down) of so many bits a weight."""

    hidden: int
    intermediate: int
    bits: float = 16.0

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        return int(3 * self.hidden * self.intermediate * self.bits / 8)


MXFP4_BITS = 4.25
"""Four bits a weight and eight for each 32 of them."""

KNOWN = {
    "deepseek-v2-lite": ExpertShape(2048, 1408),
    "qwen3-30b-a3b": ExpertShape(2048, 768),
    "qwen3-next-80b-a3b": ExpertShape(2048, 512),
    "olmoe-1b-7b": ExpertShape(2048, 1024),
    "mixtral-8x7b": ExpertShape(4096, 14336),
    "gpt-oss-20b": ExpertShape(2880, 2880, MXFP4_BITS),
    "gpt-oss-120b": ExpertShape(2880, 2880, MXFP4_BITS),
}
"""By a part of the model's name: shapes from the models' configurations, as published."""


_OTHER_FORM = re.compile(r"fp8|int\d|gptq|awq|w\d+a\d+|fp4|bnb|gguf|\dbit|bf16")
"""What names tell of weights in another form than the one that the model was published in."""


def expert_bytes(model: str, expert_mb: float | None) -> int | None:
    """Bytes of one expert: as given in MiB, else as known for the model's name, else None."""
    if expert_mb is not None:
        return int(expert_mb * MIB)
    name = model.lower()
    if _OTHER_FORM.search(name):
        return None
    return next((shape.num_bytes for part, shape in KNOWN.items() if part in name), None)
