"""Step log: the routed ids of one step, where a recorder finds them on the device.

Legend: L layers, T tokens, K choices a token.
"""

import torch
from torch import Tensor

MAX_EXPERTS = torch.iinfo(torch.int16).max + 1
"""What the ids' type can tell apart."""


class StepLog:
    """One buffer at a fixed address, written by every step of every layer.

    A step leaves its ids in the first rows; what follows them is left over from steps before.

    Args:
        num_layers: layers in order of execution.
        max_tokens: tokens of the largest step.
        top_k: experts a token of every layer.
        device: where the layers are computed.
    """

    def __init__(self, num_layers: int, max_tokens: int, top_k: int, device: torch.device) -> None:
        self.ids_LTK = torch.full(
            (num_layers, max_tokens, top_k), -1, dtype=torch.int16, device=device
        )

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest step."""
        return self.ids_LTK.shape[1]

    def layer(self, number: int) -> Tensor:
        """Where a layer writes, int16 [T, K]."""
        return self.ids_LTK[number]

    def tokens(self, count: int) -> Tensor:
        """What the last step of ``count`` tokens left, int16 [T, L, K], a view."""
        return self.ids_LTK[:, :count].transpose(0, 1)
