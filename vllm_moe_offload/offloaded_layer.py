"""One MoE layer whose experts are in the pool: its parts.

Legend: T tokens, K choices a token, E local experts, S slots, R staging rows, H hidden size,
I intermediate size, B bytes of a row, A arrivals (see ``kernels.resolve``).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vllm_moe_offload.beside import Beside
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.expert_mlp import ExpertWeights, TileConfig
from vllm_moe_offload.kernels.formats import ExpertFormat
from vllm_moe_offload.kernels.operations import Operations
from vllm_moe_offload.kernels.quantised_mlp import QuantisedWeights
from vllm_moe_offload.kernels.resolve import IdLog, log_torch
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.residency import Residency

SWEEP_PAIRS_PER_EXPERT = 16
"""From this many routed pairs an expert on, a step is a sweep: it touches nearly all experts
once, so what it brings in tells nothing about the steps after it and may evict nobody."""


@dataclass(frozen=True)
class Routing:
    """How a layer's router sees the experts: all of the model's, by ids of its own.

    ``id_of_E`` is the router's id of each local expert.
    """

    num_experts: int
    top_k: int
    id_of_E: tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """One MoE layer as the engine needs to know it.

    ``layout`` names the tensors ``w13_weight`` [N, H], ``w2_weight`` [H, I] and optionally
    ``w13_bias`` [N], ``w2_bias`` [H], or those of ``format`` if the experts are quantised; the
    weight loader may fill the same bytes in another order, ``filled_as``. ``tiles`` gives tuned
    tiles for a number of tokens. ``routing`` is needed to record what is routed and to start warm
    from it; with it a sweep's copies can begin before its first layer runs.
    """

    name: str
    num_experts: int
    layout: ExpertLayout
    activation: Activation
    weight_on_input: bool = False
    tiles: Callable[[int], TileConfig] | None = None
    routing: Routing | None = None
    format: ExpertFormat | None = None
    filled_as: ExpertLayout | None = None
    transposed: frozenset[str] = frozenset()
    """Tensors of ``filled_as`` that hold gate and up side by side."""


@dataclass(frozen=True)
class Block:
    """Rows that hold experts, and the weights in them."""

    rows_RB: Tensor
    weights: ExpertWeights | QuantisedWeights

    @classmethod
    def of(cls, spec: LayerSpec, rows_RB: Tensor) -> "Block":
        """View rows of a layer as weights."""
        views = spec.layout.views(rows_RB)
        if spec.format is not None:
            return cls(rows_RB, QuantisedWeights.of(spec.format, views))
        return cls(
            rows_RB,
            ExpertWeights(
                w13_SNH=views["w13_weight"],
                w2_SHI=views["w2_weight"],
                b13_SN=views.get("w13_bias"),
                b2_SH=views.get("w2_bias"),
            ),
        )

    @property
    def num_rows(self) -> int:
        """Experts that fit."""
        return self.rows_RB.shape[0]


@dataclass(frozen=True)
class OffloadedLayer:
    """A layer's share of every owner; staging is shared with the other layers, cut in two ways."""

    spec: LayerSpec
    pool_rows_EB: Tensor
    """As the compute device addresses them."""
    slots: Block
    halves: tuple[Block, ...]
    """Of staging, for a step."""
    blocks: tuple[Block, ...]
    """Of staging, for a sweep."""
    residency: Residency
    row_of_E: Tensor
    """Scratch for the map of a wave, int32."""
    slot_of_AE: Tensor
    """Scratch for the maps of what is at hand and of the parts of the loads, int32."""
    operations: Operations
    beside: Beside
    """Where copies are queued that go on while experts are computed."""
    is_held: bool = False
    """Whether the rows are on the compute device, because they could not be pinned."""
    log_TK: Tensor | None = None
    """Where each step leaves the router's ids, if they are recorded."""

    def is_sweep(self, num_pairs: int) -> bool:
        """Whether so many routed pairs are sure to need nearly all experts."""
        return num_pairs >= SWEEP_PAIRS_PER_EXPERT * self.spec.num_experts

    def keep(self, chosen_TK: Tensor) -> None:
        """Leave the router's ids of a step that does not resolve them, if they are recorded."""
        log = self.log(chosen_TK)
        if log is not None:
            log_torch(log)

    def hottest(self, score_E: NDArray[np.floating]) -> NDArray[np.int32]:
        """The local experts of positive score that the open slots can hold, best first.

        Args:
            score_E: of each of the router's experts.
        """
        assert self.spec.routing is not None
        local_E = score_E[list(self.spec.routing.id_of_E)]
        best = np.argsort(-local_E, kind="stable")[: self.residency.num_open]
        return best[local_E[best] > 0].astype(np.int32)

    def fill(self, experts: Tensor) -> None:
        """Let these local experts, the hottest first, be the only ones in the slots."""
        self.residency.fill(experts)
        work = self.residency.work
        self.operations.gather(
            self.pool_rows_EB, self.slots.rows_RB, work.load_expert_E, work.load_slot_E,
            work.num_loads,
        )  # fmt: skip

    def log(self, chosen_TK: Tensor) -> IdLog | None:
        """Where to leave the router's ids, if they are recorded.

        Raises:
            OffloadError: the router chose another number of experts than its configuration says.
        """
        if self.log_TK is None:
            return None
        if chosen_TK.shape[1] != self.log_TK.shape[1]:
            raise OffloadError(
                "trace_path",
                self.spec.name,
                f"the layer's router chose {chosen_TK.shape[1]} experts a token where its "
                f"configuration says {self.log_TK.shape[1]}",
                "Drop trace_path for this model",
            )
        return IdLog(chosen_TK, self.log_TK)
