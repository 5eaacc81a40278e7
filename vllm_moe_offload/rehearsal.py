"""Rehearsal: steps of every kind, run before requests wait, so that no kernel is compiled then.

Triton compiles a kernel for the compile-time sizes and the types of its first launch. Which sizes a
step takes follows from its number of tokens, in ranges: tiles, chunks, whether it sweeps. One step
of each range, with what layers were given in the profile run for types, is all that later steps can
launch. Its ids are all inactive, which costs nothing: nothing is moved, counted or learned.

Legend: T tokens, K choices a token, H hidden size.
"""

import os
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_moe_offload.kernels.compilation import compiling
from vllm_moe_offload.kernels.prefetch import adds_up_itself
from vllm_moe_offload.kernels.resolve import NOWHERE, resolve_sizes
from vllm_moe_offload.offloaded_layer import OffloadedLayer
from vllm_moe_offload.prefetch import looks_ahead
from vllm_moe_offload.products import tiles_of
from vllm_moe_offload.step import num_parts
from vllm_moe_offload.sweep import Sweep

WORTH_SAYING_S = 1.0
"""Seconds of a rehearsal from which on the log tells of it."""

MOST_THREADS = 16
"""Kernels that are compiled at a time; Python's part of it takes turns."""


@dataclass(frozen=True)
class Inputs:
    """What a layer's step gets, see ``OffloadEngine.run``."""

    x_TH: Tensor
    weight_TK: Tensor
    ids_TK: Tensor
    chosen_TK: Tensor | None
    is_padding_T: Tensor | None

    def like(self, tokens: int, device: torch.device) -> "Inputs":
        """Inputs of the same types for so many tokens that choose nothing."""

        def full(tensor: Tensor, value: int) -> Tensor:
            shape = (tokens, *tensor.shape[1:])
            return torch.full(shape, value, dtype=tensor.dtype, device=device)

        return Inputs(
            full(self.x_TH, 0),
            full(self.weight_TK, 0),
            full(self.ids_TK, NOWHERE),
            None if self.chosen_TK is None else full(self.chosen_TK, NOWHERE),
            None if self.is_padding_T is None else full(self.is_padding_T, 0),
        )

    def as_types(self) -> "Inputs":
        """The same without its values."""

        def types(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, device="meta")

        return Inputs(
            types(self.x_TH),
            types(self.weight_TK),
            types(self.ids_TK),
            None if self.chosen_TK is None else types(self.chosen_TK),
            None if self.is_padding_T is None else types(self.is_padding_T),
        )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the engine's arguments."""
        return self.x_TH, self.weight_TK, self.ids_TK, self.chosen_TK, self.is_padding_T


@dataclass(frozen=True)
class Step:
    """A step to rehearse: a layer's number and what it gets."""

    layer: int
    tokens: int
    inputs: Inputs


def launches(
    layer: OffloadedLayer, tokens: int, choices: int, dtype: torch.dtype
) -> tuple[Hashable, ...]:
    """All that launches of a step are built for and that depends on its number of tokens."""
    pairs = tokens * choices
    return (
        tiles_of(layer, tokens, pairs, dtype),
        layer.is_sweep(pairs),
        num_parts(layer, pairs),
        resolve_sizes(pairs, layer.spec.num_experts, layer.residency.num_slots),
        looks_ahead(tokens),
        adds_up_itself(tokens),
    )


def representatives(most: int, kind: Callable[[int], Hashable]) -> list[int]:
    """The fewest tokens of every kind among steps of 1 to ``most`` tokens, ascending."""
    first: dict[Hashable, int] = {}
    for tokens in range(1, most + 1):
        first.setdefault(kind(tokens), tokens)
    return list(first.values())


class Rehearsal:
    """Remembers what layers are given, and gives them the like in steps of every kind.

    Args:
        device: where the layers are computed.
        workers_on_host: processes of this host that rehearse at the same time.
    """

    def __init__(self, device: torch.device, workers_on_host: int = 1) -> None:
        self._device = device
        self._workers_on_host = workers_on_host
        self._given: dict[tuple[int, bool], Inputs] = {}
        self.is_over = False
        """Whether nothing that layers are given is of interest any more."""

    def again(self) -> "Rehearsal":
        """The same, to come, for another engine over the same layers."""
        other = Rehearsal(self._device, self._workers_on_host)
        other._given = dict(self._given)
        return other

    def note(self, layer: int, inputs: Inputs) -> None:
        """Remember the types of the largest step of a layer, with padding and without."""
        key = layer, inputs.is_padding_T is not None
        known = self._given.get(key)
        if known is None or known.x_TH.shape[0] < inputs.x_TH.shape[0]:
            self._given[key] = inputs.as_types()

    def steps(self, layers: Sequence[OffloadedLayer]) -> Iterator[Step]:
        """One step of every kind; of layers that launch the same only one."""
        tokens_of: dict[Hashable, list[int]] = {}
        rehearsed: set[Hashable] = set()
        for (number, pads), given in sorted(self._given.items(), key=lambda item: item[0]):
            shape = self._shape(layers[number], given)
            if shape not in tokens_of:
                tokens_of[shape] = self._tokens(layers[number], given)
            # The first one predicts from nothing before it, the last one for nothing after it.
            place = (shape, pads, number == 0, number + 1 == len(layers))
            if place not in rehearsed:
                rehearsed.add(place)
                for tokens in tokens_of[shape]:
                    yield Step(number, tokens, given.like(tokens, self._device))

    def perform(
        self,
        layers: Sequence[OffloadedLayer],
        sweep: Sweep | None,
        run: Callable[..., Tensor],
        say: Callable[[str], None],
    ) -> None:
        """Compile what steps launch, several kernels at a time, and launch it once.

        Args:
            layers: all layers, with their slots.
            sweep: runs steps over many tokens; None where they run like the others.
            run: runs the others, as ``OffloadEngine.run`` does.
            say: takes a line for the log.
        """
        start = time.perf_counter()

        def do(step: Step) -> None:
            part, inputs = layers[step.layer], step.inputs
            if sweep is not None and part.is_sweep(inputs.ids_TK.numel()):
                sweep.rehearse(step.layer, inputs.x_TH, inputs.weight_TK, inputs.ids_TK)
            else:
                run(step.layer, *inputs.tensors)

        processors = len(os.sched_getaffinity(0))
        threads = max(1, min(MOST_THREADS, processors // self._workers_on_host))
        with compiling(threads) as mode:
            for step in self.steps(layers):
                do(step)
        # A first launch also loads what has been compiled.
        for step in self.steps(layers):
            do(step)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - start
        if seconds >= WORTH_SAYING_S:
            say(
                f"{len(mode.future_kernels)} kernels for steps of other sizes made ready in "
                f"{seconds:.1f} s; what Triton compiles is kept for later starts"
            )

    def _tokens(self, layer: OffloadedLayer, given: Inputs) -> list[int]:
        most, choices, dtype = *given.ids_TK.shape, given.x_TH.dtype
        return representatives(most, lambda tokens: launches(layer, tokens, choices, dtype))

    @staticmethod
    def _shape(layer: OffloadedLayer, given: Inputs) -> Hashable:
        spec, residency = layer.spec, layer.residency
        types = tuple(None if t is None else (t.dtype, tuple(t.shape)) for t in given.tensors)
        slots = residency.num_slots, residency.least_open
        return (
            spec.num_experts, spec.layout, spec.activation, spec.weight_on_input, spec.format,
            slots, layer.is_held, types,
        )  # fmt: skip
