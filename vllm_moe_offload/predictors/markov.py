"""Transition counts from layer to layer, as naive Bayes.

The K experts of layer l are taken as independent evidence for each expert f of layer l + 1:

    log P(f) + sum over the K experts e of log (P(f | e) / P(f))

Both probabilities come from counts; the prior also from the recent past, which is what makes counts
from one task useful on another. The counts are on the device, where each step adds to them; from
time to time they are turned into a table of logarithms, and halved where they have become large.

Legend: L layers, M tokens, K choices a token, E experts, H hidden size.
"""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_moe_offload.kernels.fixed_point import (
    FRACTION_BITS,
    RECENT_BITS,
    RECENT_CHOICE_BITS,
)
from vllm_moe_offload.kernels.operations import operations_for
from vllm_moe_offload.kernels.predict import MarkovTables, powers
from vllm_moe_offload.predictors.figures import (
    LEAST_PRIOR,
    LIFETIME_WEIGHT,
    MOST_TOKENS,
    RECENT_FLOOR,
    RECENT_WEIGHT,
    REFRESH,
    SMOOTHING,
)
from vllm_moe_offload.predictors.predictor import Arrays, checked


class MarkovPredictor:
    """Learns which experts of the next layer follow those of this one.

    Args:
        num_layers: L.
        num_experts: E, of every layer.
        device: where the layers are computed.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        layers, experts = num_layers, num_experts
        self.tables = MarkovTables(
            evidence_LEE=zeros(layers - 1, experts, experts, dtype=torch.int16),
            prior_LE=zeros(layers, experts),
            bias_LE=zeros(layers, experts),
            count_LEE=zeros(layers - 1, experts, experts),
            use_LE=zeros(layers, experts),
            recent_LE=zeros(layers, experts),
            tokens=zeros(1, dtype=torch.int64),
            of_recent=_of_recent().to(device),
            powers=powers(device),
        )
        self._learn = operations_for(device).learn_transitions
        self._steps = 0
        self._next_refresh = 1

    def source(self, layer: int, x_TH: Tensor) -> MarkovTables:
        """The tables."""
        return self.tables

    def learn(self, ids_LTK: Tensor, num_tokens: int) -> None:
        """Count transitions and uses."""
        self._learn(ids_LTK, num_tokens, self.tables)

    def refresh(self) -> None:
        """Make the table anew every ``REFRESH`` steps, and at the start as often as it doubles."""
        self._steps += 1
        if self._steps >= self._next_refresh:
            self._next_refresh = self._steps + min(self._steps, REFRESH)
            self.make_evidence()

    def make_evidence(self) -> None:
        """Turn the counts into the logarithms that predictions are read from."""
        self._halve_large_counts()
        tables = self.tables
        uses_LE = tables.use_LE.float()
        prior_LE = (uses_LE / tables.tokens.clamp(min=1)).clamp(min=LEAST_PRIOR)
        prior_L1E = prior_LE[1:, None]
        evidence_LEE = tables.count_LEE + SMOOTHING * prior_L1E
        evidence_LEE /= (uses_LE[:-1, :, None] + SMOOTHING) * prior_L1E
        tables.evidence_LEE.copy_(_fixed(evidence_LEE.log2_()))
        tables.prior_LE.copy_(_fixed(LIFETIME_WEIGHT * prior_LE.log2()))
        choice_LE = tables.recent_LE >> (RECENT_BITS - RECENT_CHOICE_BITS)
        tables.bias_LE.copy_(tables.prior_LE + tables.of_recent[choice_LE.long()])

    def _halve_large_counts(self) -> None:
        """Keep counts within their 32 bits; the host is not asked whether they are large."""
        tables = self.tables
        # A worker with some of the experts may see tokens that choose none of its first layer.
        most = torch.maximum(tables.tokens, tables.use_LE.max())
        shift = (most >= MOST_TOKENS).int()
        for counts in (tables.count_LEE, tables.use_LE, tables.tokens):
            counts.bitwise_right_shift_(shift)

    def forget(self) -> None:
        """Begin with nothing counted, see ``Predictor``."""
        tables = self.tables
        for table in (tables.count_LEE, tables.use_LE, tables.recent_LE, tables.tokens):
            table.zero_()
        self._steps, self._next_refresh = 0, 1
        self.make_evidence()

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The counts; waits for the device."""
        names = ("count_LEE", "use_LE", "recent_LE", "tokens")
        return {name: getattr(self.tables, name).cpu().numpy() for name in names}

    def from_arrays(self, arrays: Arrays) -> None:
        """Go on counting, see ``Predictor``."""
        names = ("count_LEE", "use_LE", "recent_LE", "tokens")
        found = {n: checked(arrays, n, tuple(getattr(self.tables, n).shape)) for n in names}
        limit = 1 << RECENT_BITS
        found["recent_LE"] = found["recent_LE"].clip(max=limit)
        for name, array in found.items():
            getattr(self.tables, name).copy_(torch.from_numpy(array))
        self.make_evidence()


def _fixed(logarithm: Tensor) -> Tensor:
    return (logarithm * (1 << FRACTION_BITS)).round_()


def _of_recent() -> Tensor:
    """Weighted logarithm of each recent use, int32."""
    share = torch.arange((1 << RECENT_CHOICE_BITS) + 1, dtype=torch.float64)
    share /= 1 << RECENT_CHOICE_BITS
    return _fixed(RECENT_WEIGHT * (share + RECENT_FLOOR).log2()).int()
