"""Predictors of the experts of coming layers, and how good their guesses are.

Legend: T tokens of a step, L layers, K choices a token, E experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.predictors import figures
from vllm_moe_offload.predictors.collection import Collection, SequenceCounts
from vllm_moe_offload.predictors.figures import CAPACITY
from vllm_moe_offload.simulate.cache import Bools, Floats, Ints
from vllm_moe_offload.simulate.steps import Step, iterate, schedule
from vllm_moe_offload.trace import Trace

NONE = "none"


class Predictor(Protocol):
    """Guesses a layer's experts from what the layer before it, and older layers, were routed."""

    def predict(self, step: Step) -> Floats:
        """Expected demand [T, L, E]; layer l is told from layers below l; zero is no guess."""
        ...

    def learn(self, step: Step) -> None:
        """Take note of a whole step, after its predictions."""
        ...


class MarkovPredictor:
    """Transition counts from layer to layer, as naive Bayes.

    The K experts of layer l are taken as independent evidence for each expert f of layer l + 1:

        log P(f) + sum over the K experts e of log (P(f | e) / P(f))

    Both probabilities come from counts; the prior also from the recent past, which is what
    makes counts from one task useful on another.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._count_LEE = np.zeros((num_layers - 1, num_experts, num_experts), dtype=np.float32)
        self._use_LE = np.zeros((num_layers, num_experts))
        self._recent_LE = np.zeros((num_layers, num_experts))
        self._tokens = 0
        self._stale = 0
        self._refresh()

    def predict(self, step: Step) -> Floats:
        """Normalise the evidence to K expected experts a layer."""
        num_tokens, num_layers, top_k = step.ids_TLK.shape
        demand = np.zeros((num_tokens, num_layers, self._use_LE.shape[1]))
        if not self._tokens or num_layers == 1:
            return demand
        evidence_AE = self._evidence_LEE.reshape(-1, self._use_LE.shape[1])
        evidence = evidence_AE.take(self._pairs(step)[:, :-1], axis=0).sum(2)
        recent = figures.RECENT_WEIGHT * np.log(self._recent_LE[1:] + figures.RECENT_FLOOR)
        logit = evidence + self._prior_LE + recent
        likelihood = np.exp(logit - logit.max(-1, keepdims=True))
        demand[:, 1:] = top_k * likelihood / likelihood.sum(-1, keepdims=True)
        return demand

    def learn(self, step: Step) -> None:
        """Count transitions and uses."""
        num_experts = self._use_LE.shape[1]
        counts, uses = self._count_LEE.reshape(-1), self._use_LE.reshape(-1)
        for ids_LK, pair_LK in zip(step.ids_TLK, self._pairs(step), strict=True):
            counts[pair_LK[:-1, :, None] * num_experts + ids_LK[1:, None, :]] += 1
            uses[pair_LK] += 1
        self._tokens += len(step.ids_TLK)
        self._recent_LE *= figures.RECENT_FADE
        self._recent_LE += (1 - figures.RECENT_FADE) * step.active_LE
        self._stale += 1
        if self._stale >= figures.REFRESH or self._tokens < figures.REFRESH:
            self._refresh()

    def _pairs(self, step: Step) -> Ints:
        """Layer * E + expert, as ``step.choice_N``, [T, L, K]."""
        return step.choice_N.reshape(step.ids_TLK.shape)

    def _refresh(self) -> None:
        self._stale = 0
        prior_LE = np.maximum(self._use_LE[1:] / max(1, self._tokens), figures.LEAST_PRIOR)
        joint = self._count_LEE + figures.SMOOTHING * prior_LE[:, None, :]
        given = joint / (self._use_LE[:-1, :, None] + figures.SMOOTHING)
        self._evidence_LEE = np.log(given / prior_LE[:, None, :]).astype(np.float32)
        self._prior_LE = figures.LIFETIME_WEIGHT * np.log(prior_LE)


class EamPredictor:
    """MoE-Infinity's prediction (arXiv 2401.14361v3, PredictEAM) for the next layer.

    A token's activations up to layer l are matched by cosine with the matrices of a bounded
    collection; the guess for layer l + 1 is the share of each expert there. A matrix holds one
    sequence, but ``window`` tokens at most, so that long sequences do not blur.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        capacity: int = CAPACITY,
        window: int | None = figures.WINDOW,
    ) -> None:
        self._collection = Collection(num_layers, num_experts, capacity)
        self._running = SequenceCounts(num_layers, num_experts, window)
        self._num_experts = num_experts

    def predict(self, step: Step) -> Floats:
        """Shares of the matched matrix, times K."""
        num_tokens, num_layers, top_k = step.ids_TLK.shape
        demand = np.zeros((num_tokens, num_layers, self._num_experts))
        if self._collection.size:
            best_TL = self._collection.match(step.ids_TLK)
            demand[:, 1:] = top_k * self._collection.rows(best_TL[:, :-1], 1)
        return demand

    def learn(self, step: Step) -> None:
        """Count the tokens, and store the matrices that are complete."""
        for sequence, ids_LK in zip(step.sequence_T.tolist(), step.ids_TLK, strict=True):
            self._store(self._running.count(sequence, ids_LK))
        for sequence in step.ended:
            self._store(self._running.finish(sequence))

    def _store(self, matrix_LE: Floats | None) -> None:
        if matrix_LE is not None:
            self._collection.add(matrix_LE)


_FACTORIES: dict[str, Callable[[int, int], Predictor]] = {
    "markov": MarkovPredictor,
    "eam": EamPredictor,
}

PREDICTORS = (NONE, *_FACTORIES)


def check_predictor(name: str) -> None:
    """Raise unless there is such a predictor and a trace is enough for it."""
    if name == "gate":
        raise OffloadError(
            "--predictor",
            name,
            "it applies the next layer's router to hidden states, which traces do not hold",
            f"Measure it in the running engine; give {', '.join(PREDICTORS)} here",
        )
    if name not in PREDICTORS:
        raise OffloadError(
            "--predictor", name, "there is no such predictor", f"Give {', '.join(PREDICTORS)}"
        )


def make_predictor(name: str, trace: Trace, training: list[Trace]) -> Predictor | None:
    """Make a predictor that has seen some traces; None if the name is ``none``.

    Raises:
        OffloadError: there is no such predictor.
    """
    check_predictor(name)
    if name == NONE:
        return None
    predictor = _FACTORIES[name](trace.num_layers, trace.num_experts)
    for other in training:
        for step in iterate(other, schedule(other, batch=1)):
            predictor.learn(step)
    return predictor


@dataclass(frozen=True)
class Accuracy:
    """How good the guesses for all layers but the first are.

    Coverage is the share of the routed experts that was guessed, with K and with 2 K guesses;
    precision the share of the K guesses that was routed; ``wasted`` the number of guesses
    among the K that were not, a token.
    """

    coverage_k: float
    coverage_2k: float
    precision: float
    wasted: float


class Guesses:
    """What was guessed before each step, a bit for each layer and expert."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = (num_layers, num_experts)
        self._packed: list[NDArray[np.uint8]] = []

    def append(self, guess_LE: Bools) -> None:
        """Note the guess for the step after those that are noted."""
        self._packed.append(np.packbits(guess_LE))

    def before(self, step: Step) -> Bools:
        """The guess for a step, bool [L, E]."""
        bits = np.unpackbits(self._packed[step.number], count=math.prod(self._shape))
        return bits.view(bool).reshape(self._shape)


def observe(
    predictor: Predictor, trace: Trace, *, batch: int = 1, prefetch: int = 0
) -> tuple[Accuracy, Guesses]:
    """Let a predictor guess every step, and learn it afterwards.

    Args:
        predictor: what may have learned other traces.
        trace: what it is tested on.
        batch: sequences that run at once.
        prefetch: experts a layer and step that the guesses hold; the accuracy is that of K and 2 K.
    """
    top_k = trace.top_k
    guesses = Guesses(trace.num_layers, trace.num_experts)
    routed = found = found_2k = guessed = 0
    for step in iterate(trace, schedule(trace, batch)):
        demand_LE = predictor.predict(step).sum(0)
        guess = best_guesses(demand_LE, top_k)
        guessed += int(guess.sum())
        found += int((guess & step.active_LE).sum())
        found_2k += int((best_guesses(demand_LE, 2 * top_k) & step.active_LE).sum())
        routed += int(step.active_LE[1:].sum())
        if prefetch:
            guesses.append(best_guesses(demand_LE, prefetch))
        predictor.learn(step)
    accuracy = Accuracy(
        coverage_k=found / max(1, routed),
        coverage_2k=found_2k / max(1, routed),
        precision=found / max(1, guessed),
        wasted=(guessed - found) / max(1, trace.num_tokens),
    )
    return accuracy, guesses


def best_guesses(demand_LE: Floats, count: int) -> Bools:
    """Mark the experts of the highest demand in each layer, none without demand.

    Among equals the lower expert comes first.
    """
    num_experts = demand_LE.shape[1]
    if count >= num_experts:
        return demand_LE > 0
    least_L1 = np.sort(demand_LE, axis=-1)[:, num_experts - count, None]
    above, equal = demand_LE > least_L1, demand_LE == least_L1
    equal &= equal.cumsum(-1) <= count - above.sum(-1, keepdims=True)
    return (above | equal) & (demand_LE > 0)
