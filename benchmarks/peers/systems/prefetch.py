"""vLLM's ``--offload-backend prefetch``: whole layers are copied ahead of their use."""

from fractions import Fraction

from peers.peer import Setup
from peers.systems.vllm_server import VllmServer


class Prefetch(VllmServer):
    """vLLM with the experts of some layers of each group in host memory."""

    def __init__(self) -> None:
        super().__init__("vLLM prefetch", needs_gpu=True)

    def options(self, setup: Setup) -> list[str]:
        """Groups of layers of which the asked share stays."""
        away, group = groups(setup.share, setup.shape.moe_layers)
        return [
            "--offload-backend", "prefetch", "--offload-group-size", str(group),
            "--offload-num-in-group", str(away), "--offload-prefetch-step", "1",
            "--offload-params", "experts",
        ]  # fmt: skip


def groups(share: float, layers: int) -> tuple[int, int]:
    """Layers of a group that are offloaded, and layers of a group, nearest to a share that stays.

    At least one layer of a group is offloaded: with none the option would be refused.
    """
    away = Fraction(1 - share).limit_denominator(layers)
    return max(1, away.numerator), away.denominator if away else layers
