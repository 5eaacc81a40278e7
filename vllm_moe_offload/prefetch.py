"""Prefetch: what the next layer will probably ask for, moved while this one computes.

A layer's step, in the order of the current stream, with the copies for the next layer beside it:

    resolve -> gather -> look ahead -> expert MLP -> ... attention ... -> resolve of the next layer
                             |                                                |
                             +---------> gather for the next layer -----------+

Demand goes first: the copies begin when what this layer misses is there. The next layer's resolve
waits for them, because it may give their slots to what it misses. A CUDA graph that ends before
the next layer begins joins them at the end of the layer.

Legend: T tokens, K choices a token, L layers, E experts, H hidden size, M tokens of the largest
step that is predicted.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_moe_offload.kernels.operations import operations_for
from vllm_moe_offload.kernels.prefetch import LayerAhead, Outlook
from vllm_moe_offload.kernels.resolve import Counter
from vllm_moe_offload.offloaded_layer import OffloadedLayer
from vllm_moe_offload.predictors.predictor import Predictor
from vllm_moe_offload.prefetch_control import PrefetchControl, StepCost, StepPlan

MAX_TOKENS = 512
"""M: a step of more tokens asks for nearly all experts, whatever was routed before."""

PENDING_STEPS = 64
"""Steps whose time is still to be read; the oldest are dropped, the host never waits."""


def looks_ahead(num_tokens: int) -> bool:
    """Whether a step of so many tokens is predicted."""
    return 0 < num_tokens <= MAX_TOKENS


class Prefetch:
    """Predicts and fetches for the layers of one engine.

    Args:
        layers: all layers, in order of execution.
        predictor: guesses the next layer's experts.
        device: where the layers are computed.
        rows: experts that a layer may be fetched, or what decides on that.
        top_k: experts a token, of every layer.
        spans_layers: whether copies may go on until the next layer; else a CUDA graph is being
            captured that may end before it.
    """

    def __init__(
        self,
        layers: Sequence[OffloadedLayer],
        predictor: Predictor,
        device: torch.device,
        rows: "int | PrefetchControl",
        *,
        top_k: int,
        spans_layers: Callable[[], bool],
    ) -> None:
        self.predictor = predictor
        self._layers = layers
        self._spans_layers = spans_layers
        self._operations = operations_for(device)
        self._control = rows if isinstance(rows, PrefetchControl) else None
        self._rows = rows.rows if isinstance(rows, PrefetchControl) else rows
        experts = layers[0].spec.num_experts
        self._outlook = Outlook(
            rows=torch.full((1,), self._rows, dtype=torch.int32, device=device),
            ids_LTK=torch.full(
                (len(layers), MAX_TOKENS, top_k), -1, dtype=torch.int32, device=device
            ),
            demand_E=torch.zeros(experts, dtype=torch.int32, device=device),
        )
        self._ahead = [
            LayerAhead(
                layer.residency.tables,
                layer.residency.work,
                torch.zeros(experts, dtype=torch.int8, device=device),
            )
            for layer in layers
        ]
        is_cuda = device.type == "cuda"
        self._beside = layers[0].beside
        self._clock = _StreamClock(layers, device) if is_cuda else _HostClock(layers)

    def settle(self) -> None:
        """Compute nothing more before all copies are there."""
        self._beside.join()

    def look_ahead(self, number: int, x_TH: Tensor, ids_TK: Tensor) -> None:
        """Predict and fetch for the layer after ``number``, whose own rows are on their way.

        Args:
            number: the layer that has been resolved.
            x_TH: its input.
            ids_TK: routed local expert ids; negative ones are inactive.
        """
        if not looks_ahead(ids_TK.shape[0]):
            return
        is_last = number + 1 == len(self._layers)
        following = None if is_last else self._ahead[number + 1]
        source = None if is_last else self.predictor.source(number, x_TH)
        do = self._operations
        do.look_ahead(ids_TK, number, self._ahead[number], following, source, self._outlook)
        if is_last:
            self.predictor.learn(self._outlook.ids_LTK, ids_TK.shape[0])
            return
        part = self._layers[number + 1]
        if part.residency.num_slots > 0 and self._may_fetch:
            self._beside.fork()
            self._fetch(part)

    def layer_ended(self) -> None:
        """Join the copies if the next layer is not sure to be in the same CUDA graph."""
        if not self._spans_layers():
            self._beside.join()

    def step_begins(self, num_tokens: int) -> None:
        """Set the rows of the step, and bring into the tables what was learned.

        Args:
            num_tokens: tokens of the step, for comparing it with others.
        """
        self.predictor.refresh()
        if self._control is None:
            return
        for cost in self._clock.known():
            self._control.note(cost)
        plan = self._control.plan()
        if plan.rows != self._rows:
            self._rows = plan.rows
            self._outlook.rows.fill_(plan.rows)
        self._clock.begin(plan, num_tokens)

    def step_ended(self) -> None:
        """Note when the step is done."""
        if self._control is not None:
            self._clock.end()

    def check_integrity(self) -> None:
        """Raise if demand is left over that would be added to the next."""
        assert not self._outlook.demand_E.any(), "demand of a step is left over"

    @property
    def _may_fetch(self) -> bool:
        """Whether rows are, or may come to be, more than none."""
        return self._control is not None or self._rows > 0

    def _fetch(self, part: OffloadedLayer) -> None:
        work = part.residency.work
        with self._beside.copies():
            self._operations.gather(
                part.pool_rows_EB, part.slots.rows_RB, work.load_expert_E, work.load_slot_E,
                work.num_loads,
            )  # fmt: skip


class _HostClock:
    """Times steps that are done when the call that runs them returns."""

    def __init__(self, layers: Sequence[OffloadedLayer]) -> None:
        self._layers = layers
        self._known: list[StepCost] = []
        self._begun: tuple[StepPlan, int, float] | None = None

    def begin(self, plan: StepPlan, num_tokens: int) -> None:
        """Start the time of a step."""
        self._begun = (plan, num_tokens, time.perf_counter())

    def end(self) -> None:
        """Stop it."""
        if self._begun is None:
            return
        (plan, tokens, start), self._begun = self._begun, None
        seconds = time.perf_counter() - start
        moved = int(_moved(self._layers)) if plan.counts else None
        self._known.append(StepCost(plan, tokens, seconds, moved))

    def known(self) -> list[StepCost]:
        """Take the steps whose time is known."""
        known, self._known = self._known, []
        return known


class _StreamClock(_HostClock):
    """Times steps by events on the current stream, and never waits for them."""

    def __init__(self, layers: Sequence[OffloadedLayer], device: torch.device) -> None:
        super().__init__(layers)
        self._device = device
        self._pending: deque[_Timed] = deque(maxlen=PENDING_STEPS)
        self._step: _Timed | None = None

    def begin(self, plan: StepPlan, num_tokens: int) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._step = _Timed(plan, num_tokens, start, end)
        start.record(torch.cuda.current_stream(self._device))

    def end(self) -> None:
        if self._step is None:
            return
        step, self._step = self._step, None
        if step.plan.counts:
            step.moved = torch.zeros(1, dtype=torch.int64, pin_memory=True)
            step.moved.copy_(_moved(self._layers), non_blocking=True)
        step.end.record(torch.cuda.current_stream(self._device))
        self._pending.append(step)

    def known(self) -> list[StepCost]:
        costs = []
        while self._pending and self._pending[0].end.query():
            step = self._pending.popleft()
            moved = None if step.moved is None else int(step.moved)
            seconds = step.start.elapsed_time(step.end) / 1000
            costs.append(StepCost(step.plan, step.tokens, seconds, moved))
        return costs


@dataclass
class _Timed:
    plan: StepPlan
    tokens: int
    start: torch.cuda.Event
    end: torch.cuda.Event
    moved: Tensor | None = None


def _moved(layers: Sequence[OffloadedLayer]) -> Tensor:
    """Experts moved to the device on demand by all layers since the start, int64 [1]."""
    counters = torch.stack([x.residency.work.counters for x in layers if not x.is_held])
    return (counters[:, Counter.LOADS] + counters[:, Counter.STREAMS]).sum(0, keepdim=True)
