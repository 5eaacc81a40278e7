"""One MoE layer whose experts are in the pool: its parts, and one step through them.

Legend: T tokens, K choices a token, E local experts, S slots, R staging rows, H hidden size,
I intermediate size, B bytes of a row, P pairs (T K).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.dispatch import Dispatch
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
    operations: Operations
    log_TK: Tensor | None = None
    """Where each step leaves the router's ids, if they are recorded."""

    def is_sweep(self, num_pairs: int) -> bool:
        """Whether so many routed pairs are sure to need nearly all experts."""
        return num_pairs >= SWEEP_PAIRS_PER_EXPERT * self.spec.num_experts

    def keep(self, chosen_TK: Tensor) -> None:
        """Leave the router's ids of a step that does not resolve them, if they are recorded."""
        if self.log_TK is not None:
            log_torch(self._log(chosen_TK, self.log_TK))

    def fill(self, experts: Tensor) -> None:
        """Let these local experts, the hottest first, be the only ones in the slots."""
        self.residency.fill(experts)
        work = self.residency.work
        self.operations.gather(
            self.pool_rows_EB, self.slots.rows_RB, work.load_expert_E, work.load_slot_E,
            work.num_loads,
        )  # fmt: skip

    def step(
        self,
        x_TH: Tensor,
        weight_TK: Tensor,
        ids_TK: Tensor,
        chosen_TK: Tensor | None = None,
        ahead: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Resolve, load what is missing, compute, in launches that follow from shapes alone.

        The residents, those just brought in among them, are computed first. Experts that got
        no slot follow in waves through staging. ``chosen_TK`` are the router's ids where the local
        ones differ. ``ahead`` is called with the input and the ids when what is missing has been
        queued: what it queues comes after demand.

        Returns:
            [T, H] of the type of ``x_TH``.
        """
        products = Products(self, x_TH, weight_TK, ids_TK)
        tables, work, do = self.residency.tables, self.residency.work, self.operations
        evict = not self.is_sweep(ids_TK.numel())
        chosen_TK = ids_TK if chosen_TK is None else chosen_TK
        log = None if self.log_TK is None else self._log(chosen_TK, self.log_TK)
        do.resolve(ids_TK, tables, work, evict=evict, dispatch=products.lists, log=log)
        do.gather(
            self.pool_rows_EB, self.slots.rows_RB, work.load_expert_E, work.load_slot_E,
            work.num_loads,
        )  # fmt: skip
        if ahead is not None:
            ahead(x_TH, ids_TK)
        products.compute(tables.slot_of_E, self.slots.weights)
        rows = self.halves[0].num_rows
        for wave, first in enumerate(self._waves(ids_TK.numel(), evict=evict)):
            block = self.halves[wave % len(self.halves)]
            do.gather(
                self.pool_rows_EB, block.rows_RB, work.stream_expert_E, None, work.num_streams,
                first=first, limit=rows,
            )  # fmt: skip
            do.wave_map(work, first, self.row_of_E, rows=rows)
            products.compute(self.row_of_E, block.weights)
        return products.total()

    def _log(self, chosen_TK: Tensor, log_TK: Tensor) -> IdLog:
        if chosen_TK.shape[1] != log_TK.shape[1]:
            raise OffloadError(
                "trace_path",
                self.spec.name,
                f"the layer's router chose {chosen_TK.shape[1]} experts a token where its "
                f"configuration says {log_TK.shape[1]}",
                "Drop trace_path for this model",
            )
        return IdLog(chosen_TK, log_TK)

    def _waves(self, num_pairs: int, *, evict: bool) -> range:
        """First positions in the list of streams of every wave that a step may need.

        The bound follows from shapes alone, so that the launches are the same in every step of
        a shape. On the host the list's own length is free to read and ends the loop earlier.
        """
        experts, slots = self.spec.num_experts, self.residency.num_slots
        active = min(experts, num_pairs)
        bound = max(0, active - slots) if evict else min(active, experts - slots)
        if bound and self.row_of_E.device.type == "cpu":
            bound = int(self.residency.work.num_streams)
        return range(0, bound, max(1, self.halves[0].num_rows))


class Products:
    """The experts' results for one layer's tokens, and their sum.

    Every (token, choice) pair writes a row of its own, and one reduction in choice order ends
    the step, so that the result does not depend on when and from where a pair was computed.
    """

    def __init__(
        self, layer: OffloadedLayer, x_TH: Tensor, weight_TK: Tensor, ids_TK: Tensor
    ) -> None:
        self._layer = layer
        self._inputs = (x_TH, weight_TK, ids_TK)
        self._rows_TKH = x_TH.new_empty((*ids_TK.shape, layer.slots.weights.hidden))
        self._product, self._prepared = layer.operations.products(layer.spec.format, x_TH)
        self._tiles: TileConfig | None = None
        self.lists: Dispatch | None = None
        if layer.operations.sorts_pairs:
            tokens, experts = x_TH.shape[0], layer.spec.num_experts
            self._tiles = (
                layer.spec.tiles(tokens)
                if layer.spec.tiles
                else layer.slots.weights.tiles(experts, ids_TK.numel(), x_TH.dtype)
            )
            self.lists = Dispatch.empty(ids_TK.numel(), experts, self._tiles.block_m, x_TH.device)

    def compute(self, row_of_E: Tensor, weights: ExpertWeights | QuantisedWeights) -> None:
        """Compute the pairs whose expert has a row in ``weights``, see ``kernels.expert_mlp``."""
        spec, do = self._layer.spec, self._layer.operations
        self._product(
            *self._inputs, row_of_E, weights, spec.activation, self._rows_TKH,
            weight_on_input=spec.weight_on_input, **self._prepared,
            **do.sorted_for(self._tiles, self.lists),
        )  # fmt: skip

    def total(self) -> Tensor:
        """Sum each token's rows, [T, H]."""
        x_TH, _, ids_TK = self._inputs
        y_TH = x_TH.new_empty((x_TH.shape[0], self._rows_TKH.shape[2]))
        self._layer.operations.combine(self._rows_TKH, ids_TK, y_TH)
        return y_TH
