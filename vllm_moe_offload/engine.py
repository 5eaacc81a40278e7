"""The offload engine of one loaded model: owns pool, slots, staging and residency; runs layers.

Knows nothing of vLLM. Life of an engine: ``add_layer`` for every MoE layer while the model is
built, ``plan`` once before the weights come, ``finish_loading`` after, then ``run``. An engine
whose slots are borrowed from the KV cache has none until ``borrow``, and everything streams.

Legend: T tokens, K choices a token, E local experts of a layer, H hidden size, L layers,
S slots of a layer, B bytes of a row.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_moe_offload.arena import SlotArena
from vllm_moe_offload.assembly import Memory, make_layers, make_step_log
from vllm_moe_offload.budget import Budget, LayerDemand, plan_budget
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.counters import Counters
from vllm_moe_offload.counts import LayerCounts
from vllm_moe_offload.engine_report import cost_of_unpinned
from vllm_moe_offload.engine_stats import EngineStats
from vllm_moe_offload.eviction import AdaptiveEviction, make_eviction
from vllm_moe_offload.foresight import check_foresight, make_prefetch
from vllm_moe_offload.kernels.resolve import NOWHERE
from vllm_moe_offload.lending.borrower import Borrower
from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.rows import borrowed_rows
from vllm_moe_offload.memory import available_host_memory
from vllm_moe_offload.memory_check import check_memory
from vllm_moe_offload.offloaded_layer import LayerSpec, OffloadedLayer
from vllm_moe_offload.pcie import device_address
from vllm_moe_offload.pool import HostPool, PoolSegment
from vllm_moe_offload.populate import populate, processors_near
from vllm_moe_offload.predictors.gate import Router
from vllm_moe_offload.predictors.predictor import Predictor
from vllm_moe_offload.prefetch import Prefetch
from vllm_moe_offload.rehearsal import Inputs, Rehearsal
from vllm_moe_offload.residencies import Residencies
from vllm_moe_offload.residency import Residency
from vllm_moe_offload.staging import Staging
from vllm_moe_offload.step import run_step
from vllm_moe_offload.step_log import StepLog
from vllm_moe_offload.sweep import Sweep
from vllm_moe_offload.traffic import Traffic
from vllm_moe_offload.transfer_time import row_seconds_by_layer


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

    _check = staticmethod(check_memory)

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
        self._prefetch: Prefetch | None = None
        self._spans_layers = spans_layers
        self._say = say or (lambda _: None)
        self.routers: Sequence[Router] | None = None
        """Of every layer, for a predictor that asks them; set before ``plan``."""
        self.borrows = False
        """Whether the slots are borrowed from the KV cache's buffer; set before ``plan``."""
        self.not_shared: str | None = None
        """Why they are not, if they were to be."""
        self.device_free: int | None = None  # bytes to be taken at most; set before ``plan``
        self.taken_bytes = 0  # of ``gpu_gb``, by the model that this one drafts for
        self.dense_bytes = 0  # of weights outside the pool, for the log
        self.borrower: Borrower | None = None
        self._score_LE: Sequence[NDArray[np.floating]] | None = None
        self._seconds_of_L: list[float] = []
        self.rehearsal = Rehearsal(device, workers_on_host)

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
        budget = plan_budget(
            demands,
            self.config,
            borrows=self.borrows,
            device_free=self.device_free,
            taken_bytes=self.taken_bytes,
        )
        host = available_host_memory().shared_by(self._workers_on_host)
        self._check(budget, self.config, host, self.device, self.device_free)
        rows = [segment.rows_EB for segment in self.pool.segments]
        populate(rows, processors_near(device_address(self.device)))
        self.arena = SlotArena([s.layout for s in self.specs], budget.slots, self.device)
        self.staging = Staging(budget.staging_bytes, budget.largest_staged_row, self.device)
        if self._log_tokens:
            self.step_log = make_step_log(
                self.specs, self._log_tokens, self.device, self.config.trace_path
            )
        self.budget = budget
        return budget

    def finish_loading(self) -> None:
        """Pin the pool and make the layers ready to run. Idempotent."""
        if self._layers:
            return
        if self.device.type == "cuda" and (held := self.pool.register(self.device)):
            self._say(cost_of_unpinned(held, self.pool.num_bytes))
        self._make_ready([self.arena.rows(n) for n in range(len(self.specs))], least_open=None)

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
        slot_rows_L = [borrowed_rows(buffer, boundary, n) for n in range(len(self.specs))]
        residencies = self._make_ready(slot_rows_L, least_open=boundary.min_increments)
        traffic = Traffic(self._layers, self._seconds_of_L, self.device)
        self.borrower = Borrower(boundary, buffer, residencies, traffic, self._settle)
        return self.borrower

    def _make_ready(self, slot_rows_L: Sequence[Tensor], *, least_open: int | None) -> Residencies:
        """Make all layers anew over these slots, all empty, with what watches over them."""
        experts = [spec.num_experts for spec in self.specs]
        slots = [rows.shape[0] for rows in slot_rows_L]
        self._eviction = make_eviction(self.config.policy, experts, slots, least_open, self.device)
        residencies = Residencies(
            experts, slots, self.device, self._eviction, least_open=least_open
        )
        memory = Memory(self.pool, self.staging, self.step_log, self.device)
        self._layers = make_layers(self.specs, memory, slot_rows_L, residencies)
        self._seconds_of_L = row_seconds_by_layer(self._layers, self.device)
        self._counters = Counters(self._layers, self.device, self._seconds_of_L)
        self._sweep = None
        if self.device.type == "cuda" and self.staging.num_bytes > 0:
            rows = [self.pool.source_rows(segment) for segment in self.pool.segments]
            self._sweep = Sweep(self._layers, rows, self.device)
        self._prefetch = make_prefetch(
            self.config, self._layers, self.routers, self.device, self._spans_layers, self._say
        )
        return residencies

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
            experts = torch.from_numpy(layer.hottest(np.asarray(score_E))).to(self.device)
            layer.fill(experts)
            if self._eviction is not None:
                self._eviction.note_fill(number, experts)
            filled += experts.numel()
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
        if not self.rehearsal.is_over:
            self.rehearsal.note(layer, Inputs(x_TH, weight_TK, ids_TK, chosen_TK, is_padding_T))
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

    def rehearse(self) -> None:
        """Compile what steps of up to as many tokens as yet may launch; once, before requests."""
        is_due, self.rehearsal.is_over = not self.rehearsal.is_over, True
        if is_due and self.device.type == "cuda":
            self.rehearsal.perform(self._layers, self._sweep, self.run, self._say)

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

    def total(self, counts: Sequence[LayerCounts]) -> EngineStats:
        """Add up the counts of all layers."""
        return EngineStats.of(
            counts,
            layers=len(self.specs),
            experts_in_pool=sum(spec.num_experts for spec in self.specs),
            pool_bytes=self.pool.num_bytes,
            slot_bytes=self.arena.num_bytes + self.lent_bytes,
            lent_bytes=self.lent_bytes,
            staging_bytes=self.staging.num_bytes,
        )

    @property
    def shared_blocks(self) -> tuple[int, int] | None:
        """First block of the KV cache that experts hold now, and how many blocks there are."""
        borrower = self.borrower
        return (borrower.first_block, borrower.boundary.num_blocks) if borrower else None

    @property
    def lent_bytes(self) -> int:
        """Bytes of the KV cache's buffer that hold experts now."""
        return self.borrower.lent_bytes if self.borrower else 0

    @property
    def eviction(self) -> AdaptiveEviction | None:
        """What learns whom to evict, if anything does."""
        return self._eviction

    @property
    def predictor(self) -> Predictor | None:
        """What guesses the next layer's experts, if anything does."""
        return self._prefetch.predictor if self._prefetch else None

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
        self._counters = self._prefetch = self.borrower = None
        self.pool.close()
