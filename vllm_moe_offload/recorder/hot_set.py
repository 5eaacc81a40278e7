"""Hot set: how much each expert was used lately.

Legend: T tokens, L layers, K choices a token, E experts of a layer.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.errors import OffloadError

SECTION = "hot_set"
"""Its part of a warm start."""

HALF_LIFE = 4096
"""Tokens after which a use counts half. On recorded traces 64 to 4096 fill slots equally well;
a long one is not dominated by a single prompt."""

SAMPLE = 512
"""Tokens counted of those that come at once. More would tell hardly more, and counting keeps
Python's lock from the thread that runs the steps."""


class HotSet:
    """Exponential averages of the experts' use, one for each expert of each layer.

    Args:
        num_layers: layers in order of execution.
        num_experts: experts of the layer that has most.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.score_LE = np.zeros((num_layers, num_experts), np.float64)

    def update(self, ids_TLK: NDArray[np.integer]) -> None:
        """Count tokens in the order in which they ran; ids out of range count nothing.

        Of many tokens every n-th counts n times.
        """
        step = -(-len(ids_TLK) // SAMPLE)
        if not step:
            return
        layers, experts = self.score_LE.shape
        sample_TLK = ids_TLK[len(ids_TLK) - 1 :: -step]  # the last one first
        weight_T = step * 0.5 ** (step * np.arange(len(sample_TLK)) / HALF_LIFE)
        counted = (sample_TLK >= 0) & (sample_TLK < experts)
        bins = sample_TLK.astype(np.int64) + experts * np.arange(layers)[:, None]
        weights = np.broadcast_to(weight_T[:, None, None], bins.shape)
        uses = np.bincount(bins[counted], weights[counted], minlength=layers * experts)
        self.score_LE *= 0.5 ** (len(ids_TLK) / HALF_LIFE)
        self.score_LE += uses.reshape(layers, experts)

    def section(self) -> dict[str, NDArray[np.float32]]:
        """Return what a warm start keeps."""
        return {"score_LE": self.score_LE.astype(np.float32)}

    def restore(self, section: Mapping[str, NDArray[Any]]) -> None:
        """Go on from what a warm start kept.

        Raises:
            OffloadError: it is no hot set of such a model.
        """
        score_LE = section.get("score_LE")
        if score_LE is None or score_LE.shape != self.score_LE.shape:
            problem = "it has no hot set of this model's layers and experts"
        elif score_LE.dtype.kind != "f" or not (np.isfinite(score_LE) & (score_LE >= 0)).all():
            problem = "its hot set holds something else than averages"
        else:
            self.score_LE = score_LE.astype(np.float64)
            return
        raise OffloadError(SECTION, "warm start", problem, "Delete the file")
