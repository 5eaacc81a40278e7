"""The offload engine of one loaded model: owns pool, slots, staging and residency; runs layers.

Knows nothing of vLLM. Life of an engine: ``add_layer`` for every MoE layer while the model is
built, ``plan`` once before the weights come, ``finish_loading`` after, then ``run``. An engine
whose slots are borrowed from the KV cache has none until ``borrow``, and everything streams.

Legend: T tokens, K choices a token, E local experts of a layer, H hidden size, R staging rows.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_moe_offload.arena import SlotArena
from vllm_moe_offload.beside import Beside, beside_on
from vllm_moe_offload.budget import Budget, LayerDemand, check_budget, plan_budget
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.counters import Counters
from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.engine_stats import EngineStats
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.eviction import AdaptiveEviction
from vllm_moe_offload.foresight import check_foresight, make_prefetch
from vllm_moe_offload.kernels.operations import operations_for
from vllm_moe_offload.kernels.resolve import NOWHERE
from vllm_moe_offload.lending.borrower import Borrower
from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.orders import Report
from vllm_moe_offload.lending.rows import borrowed_rows
from vllm_moe_offload.memory import available_host_memory
from vllm_moe_offload.offloaded_layer import Block, LayerSpec, OffloadedLayer
from vllm_moe_offload.pcie import device_address
from vllm_moe_offload.pool import HostPool, PoolSegment
from vllm_moe_offload.populate import populate, processors_near
from vllm_moe_offload.predictors.gate import Router
from vllm_moe_offload.predictors.predictor import Predictor
from vllm_moe_offload.prefetch import Prefetch, row_seconds
from vllm_moe_offload.residency import Residency
from vllm_moe_offload.sizes import format_size
from vllm_moe_offload.staging import Staging, rows_of
from vllm_moe_offload.step import MAX_PARTS, run_step
from vllm_moe_offload.step_log import MAX_EXPERTS, StepLog
from vllm_moe_offload.sweep import Sweep
from vllm_moe_offload.traffic import Traffic


class OffloadEngine:
    """Runs the routed experts of one model out of the host pool.

    Args:
        config: the plugin's options.
        device: where the layers are computed; the host itself is allowed.
        workers_on_host: processes that load a part of the same model into this host's memory.
        log_tokens: tokens of the largest step if the routed ids are to be logged, else 0.
        spans_layers: whether work that a layer leaves beside it may go on until the next one; not
            while a CUDA graph is captured that may end in between.
        say: takes a line for the log.
    """

    def __init__(
        self,
        config: MoeOffloadConfig,
        device: torch.device,
        *,
        workers_on_host: int = 1,
        log_tokens: int = 0,
        spans_layers: Callable[[], bool] = lambda: True,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.device = device
        self.step_log: StepLog | None = None
        self._workers_on_host = workers_on_host
        self._log_tokens = log_tokens
        self.pool = HostPool()
        self.specs: list[LayerSpec] = []
        self.budget: Budget | None = None
        self._layers: list[OffloadedLayer] = []
        self._sweep: Sweep | None = None
        self._eviction: AdaptiveEviction | None = None
        self._counters: Counters | None = None
        self._traffic: Traffic | None = None
        self._prefetch: Prefetch | None = None
        self._spans_layers = spans_layers
        self._say = say or (lambda _: None)
        self.routers: Sequence[Router] | None = None
        """Of every layer, for a predictor that asks them; set before ``plan``."""
        self.borrows = False
        """Whether the slots are borrowed from the KV cache's buffer; set before ``plan``."""
        self.not_shared: str | None = None
        """Why they are not, if they were to be."""
        self.borrower: Borrower | None = None
        self._slot_rows: list[Tensor] = []
        self._score_LE: Sequence[NDArray[np.floating]] | None = None
        self._seconds_of_L: list[float] = []

    @property
    def policies(self) -> dict[str, str]:
        """What decides which experts have a slot, by the name of the decision."""
        return {"eviction": self.config.policy, "predictor": self.config.predictor}

    def add_layer(self, spec: LayerSpec) -> tuple[int, PoolSegment]:
        """Reserve the pool rows of the next layer in order of execution.

        Returns:
            The layer's number for ``run``, and its rows for the weight loader to fill.
        """
        assert self.budget is None, "layers are added before the budget is planned"
        self.specs.append(spec)
        segment = self.pool.add(spec.name, spec.layout, spec.num_experts, spec.filled_as)
        return len(self.specs) - 1, segment

    def plan(self) -> Budget:
        """Decide slots and staging, check that everything fits, allocate them.

        Raises:
            OffloadError: the machine or the container cannot hold it.
        """
        check_foresight(self.config, self.specs, self.routers)
        demands = [LayerDemand(s.name, s.num_experts, s.layout.row_bytes) for s in self.specs]
        budget = plan_budget(demands, self.config, borrows=self.borrows)
        self._check(budget)
        rows = [segment.rows_EB for segment in self.pool.segments]
        populate(rows, processors_near(device_address(self.device)))
        self.arena = SlotArena([s.layout for s in self.specs], budget.slots, self.device)
        self.staging = Staging(budget.staging_bytes, budget.largest_staged_row, self.device)
        if self._log_tokens:
            top_k = self._common_top_k()
            self.step_log = StepLog(len(self.specs), self._log_tokens, top_k, self.device)
        self.budget = budget
        return budget

    def finish_loading(self) -> None:
        """Pin the pool and make the layers ready to run. Idempotent."""
        if self._layers:
            return
        if self.device.type == "cuda" and (held := self.pool.register(self.device)):
            self._say(_cost_of_unpinned(held, self.pool.num_bytes))
        self._slot_rows = [self.arena.rows(number) for number in range(len(self.specs))]
        self._make_ready(least_open=None)

    def borrow(self, buffer: Tensor, boundary: Boundary) -> Borrower:
        """Take slots from the KV cache's buffer; before any graph is captured that stays.

        Args:
            buffer: the whole of it, one-dimensional, of any one-byte type.
            boundary: where slots lie in it.

        Returns:
            What opens and closes them.
        """
        assert self.borrows, "the engine was planned with slots of its own"
        assert self._layers, "slots are borrowed when the weights are there"
        self._slot_rows = [borrowed_rows(buffer, boundary, n) for n in range(len(self.specs))]
        self._make_ready(least_open=boundary.min_increments)
        self._traffic = Traffic(self._layers, self.device)
        residencies = [layer.residency for layer in self._layers]
        self.borrower = Borrower(boundary, buffer, residencies, self._settle)
        return self.borrower

    def _make_ready(self, *, least_open: int | None) -> None:
        self._eviction = self._make_eviction(least_open)
        beside = beside_on(self.device)
        self._layers = [self._ready(n, beside, least_open) for n in range(len(self.specs))]
        self._seconds_of_L = self._row_seconds()
        self._counters = Counters(self._layers, self.device, self._seconds_of_L)
        self._sweep = None
        if self.device.type == "cuda" and self.staging.num_bytes > 0:
            rows = [self.pool.source_rows(segment) for segment in self.pool.segments]
            self._sweep = Sweep(self._layers, rows, self.device)
        self._prefetch = make_prefetch(
            self.config, self._layers, self.routers, self.device, self._spans_layers, self._say
        )

    def _settle(self) -> None:
        """Compute nothing more before copies that go on beside are there, and plan them anew."""
        if self._sweep is not None:
            self._sweep.settle()
        if self._prefetch is not None:
            self._prefetch.settle()

    def fill_slots(self, score_LE: Sequence[NDArray[np.floating]]) -> int:
        """Load the experts with the highest scores; not between the layers of a step.

        Args:
            score_LE: for each layer a score for each of the router's experts. An expert
                without a positive one is not loaded.

        Returns:
            How many experts of all layers are in slots now.
        """
        self._score_LE = score_LE
        filled = 0
        for number, (layer, score_E) in enumerate(zip(self._layers, score_LE, strict=True)):
            routing = layer.spec.routing
            assert routing is not None
            local_E = np.asarray(score_E)[list(routing.id_of_E)]
            hottest = np.argsort(-local_E, kind="stable")[: layer.residency.num_open]
            experts = hottest[local_E[hottest] > 0].astype(np.int32)
            on_device = torch.from_numpy(experts).to(self.device)
            layer.fill(on_device)
            if self._eviction is not None:
                self._eviction.note_fill(number, on_device)
            filled += experts.size
        return filled

    def refill_slots(self) -> int | None:
        """Do so again, because more slots have opened; None if it was never done."""
        return None if self._score_LE is None else self.fill_slots(self._score_LE)

    def run(
        self,
        layer: int,
        x_TH: Tensor,
        weight_TK: Tensor,
        ids_TK: Tensor,
        chosen_TK: Tensor | None = None,
        is_padding_T: Tensor | None = None,
    ) -> Tensor:
        """Compute the routed experts of a layer.

        A step over many tokens sweeps all experts with the copy engine's help, unless a CUDA
        graph is being captured, in which the host may not look at the tables.

        Args:
            layer: its number from ``add_layer``.
            x_TH: hidden states.
            weight_TK: router weights.
            ids_TK: routed local expert ids; negative ones are inactive.
            chosen_TK: the router's ids where the local ones differ.
            is_padding_T: rows that choose nothing, whatever their ids are.

        Returns:
            [T, H] of the type of ``x_TH``.
        """
        part, prefetch = self._layers[layer], self._prefetch
        if prefetch is not None:
            prefetch.settle()
        if self._sweep is not None and not torch.cuda.is_current_stream_capturing():
            if part.is_sweep(ids_TK.numel()):
                part.keep(ids_TK if chosen_TK is None else chosen_TK)
                if is_padding_T is not None:
                    ids_TK = ids_TK.masked_fill(is_padding_T.unsqueeze(1), NOWHERE)
                return self._sweep.run(layer, x_TH, weight_TK, ids_TK)
            self._sweep.settle()
        if prefetch is None or part.is_sweep(ids_TK.numel()):
            y_TH = run_step(part, x_TH, weight_TK, ids_TK, chosen_TK, is_padding_T=is_padding_T)
        else:
            ahead = partial(prefetch.look_ahead, layer)
            y_TH = run_step(part, x_TH, weight_TK, ids_TK, chosen_TK, ahead, is_padding_T)
            prefetch.layer_ended()
        # A sweep reads nearly everything and evicts nobody: there is nothing to learn.
        ends_step = part is self._layers[-1] and not part.is_sweep(ids_TK.numel())
        if self._eviction is not None and ends_step:
            self._eviction.learn()
        return y_TH

    def step_begins(self, num_tokens: int, scheduled: int = 0) -> None:
        """Start the copies of a step that will be a sweep, ahead of its layers.

        Args:
            num_tokens: tokens of the step, 0 for a step within CUDA graphs.
            scheduled: tokens of the step in any case.
        """
        if self._prefetch is not None:
            self._prefetch.step_begins(scheduled)
        if self._sweep is None:
            return
        if self._will_sweep(num_tokens):
            self._sweep.begin()
        else:
            self._sweep.settle()

    def step_ended(self, next_tokens: int) -> None:
        """Start the copies of the next step, if it is sure to be a sweep.

        Args:
            next_tokens: tokens that the next step will have, as far as that is known now.
        """
        if self._prefetch is not None:
            self._prefetch.step_ended()
        if self._sweep is not None and self._will_sweep(next_tokens):
            self._sweep.follow()

    def _will_sweep(self, num_tokens: int) -> bool:
        return all(
            layer.spec.routing is not None and layer.is_sweep(num_tokens * layer.spec.routing.top_k)
            for layer in self._layers
        )

    def stats(self) -> EngineStats:
        """Return what happened since the start or the last reset; waits for the device."""
        return self.total(self.layer_counts())

    def layer_counts(self) -> list[LayerCounts]:
        """Return the same by layer; waits for the device."""
        return self._counters.read() if self._counters else []

    def snapshot(self) -> list[LayerCounts] | None:
        """Return about the same while steps go on, which do not notice; see ``Counters``."""
        return self._counters.snapshot() if self._counters else []

    def total(self, layers: Sequence[LayerCounts]) -> EngineStats:
        """Add up the counts of all layers."""
        demand_bytes = sum(layer.demand_bytes for layer in layers)
        wave_bytes = sum(layer.wave_bytes for layer in layers)
        prefetch_bytes = sum(layer.prefetch_bytes for layer in layers)
        return EngineStats(
            layers=len(self.specs),
            experts_in_pool=sum(spec.num_experts for spec in self.specs),
            slots=sum(layer.slots for layer in layers),
            resident=sum(layer.resident for layer in layers),
            pool_bytes=self.pool.num_bytes,
            slot_bytes=self.arena.num_bytes + self.lent_bytes,
            lent_bytes=self.lent_bytes,
            staging_bytes=self.staging.num_bytes,
            active=sum(layer.active for layer in layers),
            hits=sum(layer.hits for layer in layers),
            misses=sum(layer.misses for layer in layers),
            streamed=sum(layer.streams for layer in layers),
            demand_bytes=demand_bytes,
            wave_bytes=wave_bytes,
            bytes_moved=demand_bytes + wave_bytes + prefetch_bytes,
            prefetch_bytes=prefetch_bytes,
            prefetched=sum(layer.prefetched for layer in layers),
            prefetch_hits=sum(layer.prefetch_hits for layer in layers),
            found=sum(layer.found for layer in layers),
            foreseeable=sum(layer.foreseeable for layer in layers),
            transfer_seconds=sum(layer.transfer_seconds for layer in layers),
        )

    @property
    def shared_blocks(self) -> tuple[int, int] | None:
        """First block of the KV cache that experts hold now, and how many blocks there are."""
        if self.borrower is None:
            return None
        boundary = self.borrower.boundary
        return boundary.first_block(self.borrower.increments), boundary.num_blocks

    @property
    def lent_bytes(self) -> int:
        """Bytes of the KV cache's buffer that hold experts now."""
        return self.borrower.lent_bytes if self.borrower else 0

    @property
    def predictor(self) -> Predictor | None:
        """What guesses the next layer's experts, if anything does."""
        return self._prefetch.predictor if self._prefetch else None

    def lending_report(self) -> Report | None:
        """What the scheduler hears of the slots that are borrowed; never waits for the device."""
        if self.borrower is None or self._traffic is None:
            return None
        seconds = sum(self._seconds_of_L)
        row_bytes = self.borrower.boundary.increment_bytes
        return self.borrower.report(
            self._traffic.num_bytes(), row_bytes / seconds if seconds else 0.0
        )

    def reset_stats(self) -> None:
        """Start counting anew; residency stays."""
        for layer in self._layers:
            layer.residency.work.counters.zero_()

    def forget_routing(self) -> None:
        """Forget what was learned, as from made-up steps; residency and counts stay."""
        if self._eviction is not None:
            self._eviction.forget()
        if self.predictor is not None:
            self.predictor.forget()

    def residency(self, layer: int) -> Residency:
        """Return the tables of a layer."""
        return self._layers[layer].residency

    def slot_rows(self, layer: int) -> Tensor:
        """Return the slots of a layer, uint8 [S, B]."""
        return self._layers[layer].slots.rows_RB

    def check_integrity(self) -> None:
        """Raise unless every owner is consistent and every slot holds its expert's bytes."""
        self.pool.check_integrity()
        self.arena.check_integrity()
        if self._prefetch is not None:
            self._prefetch.check_integrity()
        if self.borrower is not None:
            self.borrower.check_integrity()
        if self._eviction is not None:
            self._eviction.check_integrity()
        for layer, segment in zip(self._layers, self.pool.segments, strict=True):
            layer.residency.check_integrity()
            expert_of_S = layer.residency.tables.expert_of_S.cpu()
            slots = (expert_of_S >= 0).nonzero().flatten()
            held = layer.slots.rows_RB[slots.to(self.device)].cpu()
            assert torch.equal(held, segment.rows_EB[expert_of_S[slots].long()]), (
                f"a slot of {segment.name} does not hold the expert that its table says"
            )

    def close(self) -> None:
        """Unpin the pool."""
        self._layers = []
        self._counters = self._prefetch = self._traffic = self.borrower = None
        self._slot_rows = []
        self.pool.close()

    def _common_top_k(self) -> int:
        """Experts a token of all layers.

        Raises:
            OffloadError: the layers differ, or have more experts than a log can tell apart.
        """
        routings = [spec.routing for spec in self.specs]
        top_ks = sorted({routing.top_k for routing in routings if routing is not None})
        problem = None
        if len(top_ks) != 1 or None in routings:
            problem = f"its layers choose different numbers of experts a token: {top_ks}"
        elif max(r.num_experts for r in routings if r is not None) > MAX_EXPERTS:
            problem = f"it has layers of more than {MAX_EXPERTS} experts"
        if problem:
            raise OffloadError(
                "trace_path",
                self.config.trace_path,
                f"this model cannot be recorded: {problem}",
                "Drop trace_path",
            )
        return top_ks[0]

    def _check(self, budget: Budget) -> None:
        host = available_host_memory().shared_by(self._workers_on_host)
        on_host = self.device.type == "cpu"
        check_budget(
            budget,
            self.config,
            host=host,
            device_free=host.available if on_host else torch.cuda.mem_get_info(self.device)[0],
            device_name=host.limited_by if on_host else torch.cuda.get_device_name(self.device),
            device_is_host=on_host,
        )

    def _make_eviction(self, least_open: int | None) -> AdaptiveEviction | None:
        experts = [spec.num_experts for spec in self.specs]
        slots = [rows.shape[0] for rows in self._slot_rows]
        open_ = slots if least_open is None else [least_open] * len(slots)
        # Where all experts have slots, or none has, nobody is ever evicted.
        evicts = any(s > 0 and o < e for e, s, o in zip(experts, slots, open_, strict=True))
        if self.config.policy != "adaptive" or not evicts:
            return None
        return AdaptiveEviction(experts, slots, self.device, operations_for(self.device))

    def _row_seconds(self) -> list[float]:
        """What an expert of each layer takes to a slot, at the rate of the largest one."""
        loading = [x for x in self._layers if x.residency.num_slots > 0 and not x.is_held]
        if not loading:
            return [0.0] * len(self._layers)  # Nothing ever crosses the link to a slot.
        largest = max(loading, key=lambda layer: layer.spec.layout.row_bytes)
        per_byte = row_seconds(largest, self.device) / largest.spec.layout.row_bytes
        return [per_byte * spec.layout.row_bytes for spec in self.specs]

    def _ready(self, number: int, beside: Beside, least_open: int | None) -> OffloadedLayer:
        spec, segment = self.specs[number], self.pool.segments[number]
        slots, experts = self._slot_rows[number], self.specs[number].num_experts
        order = self._eviction.order(number) if self._eviction is not None else None
        return OffloadedLayer(
            spec=spec,
            pool_rows_EB=self.pool.device_rows(segment, self.device),
            slots=Block.of(spec, slots),
            halves=self._staged(spec, self.staging.halves),
            blocks=self._staged(spec, self.staging.blocks),
            residency=Residency(experts, slots.shape[0], self.device, order, least_open=least_open),
            row_of_E=torch.empty(experts, dtype=torch.int32, device=self.device),
            slot_of_AE=torch.empty(1 + MAX_PARTS, experts, dtype=torch.int32, device=self.device),
            operations=operations_for(self.device),
            beside=beside,
            is_held=self.pool.is_held(segment),
            log_TK=self.step_log.layer(number) if self.step_log else None,
        )

    @staticmethod
    def _staged(spec: LayerSpec, blocks: Sequence[Tensor]) -> tuple[Block, ...]:
        layout, limit = spec.layout, spec.num_experts
        return tuple(Block.of(spec, rows_of(block, layout, limit=limit)) for block in blocks)


def describe(engine: OffloadEngine) -> str:
    """One line on what was offloaded and what it takes."""
    assert engine.budget is not None
    budget, specs = engine.budget, engine.specs
    experts = sorted({spec.num_experts for spec in specs})
    return (
        f"moe-offload: {len(specs)} MoE layers of {_span(experts)} experts, "
        f"{format_size(budget.pool_bytes)} in the host pool, "
        f"{_span(sorted(set(budget.slots)))} slots a layer taking "
        f"{format_size(budget.slot_bytes)} of {engine.device.type} memory, "
        f"{format_size(budget.staging_bytes)} of staging"
    )


def _cost_of_unpinned(held: int, total: int) -> str:
    return (
        f"CUDA refused to pin {format_size(held)} of the host pool's {format_size(total)}. These "
        "experts are held in GPU memory as a whole, which leaves that much less to the KV cache. "
        "Raise the limit on locked memory (ulimit -l unlimited, docker run --ulimit memlock=-1) or "
        "free host memory."
    )


def _span(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
