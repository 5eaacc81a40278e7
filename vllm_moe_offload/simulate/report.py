"""The rows of ``vllm-moe-offload simulate``: one for each trace, cache size and policy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.simulate.policies import ALIAS, ENGINE_DEFAULT, check_policy
from vllm_moe_offload.simulate.predictors import (
    NONE,
    Accuracy,
    Guesses,
    check_predictor,
    make_predictor,
    observe,
)
from vllm_moe_offload.simulate.replay import Replay, replay, slots_of
from vllm_moe_offload.simulate.sizes import expert_bytes
from vllm_moe_offload.sizes import MIB
from vllm_moe_offload.trace import Trace

BASELINE, BOUND = "lru", "belady"


@dataclass(frozen=True)
class Question:
    """What to simulate.

    ``caches`` are shares of a layer's experts; ``prefetch_mb`` is a budget a layer and step in
    MiB, and ``expert_mb`` the size of an expert in MiB, None to know it from the model's name.
    """

    caches: tuple[float, ...]
    policies: tuple[str, ...]
    predictors: tuple[str, ...] = (NONE,)
    prefetch_mb: float = 0.0
    batch: int = 1
    expert_mb: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the answer; what does not apply is None."""

    trace: str
    policy: str
    predictor: str
    cache: float
    batch: int
    hit_ratio: float
    accesses: int
    bytes_per_token: float | None
    gap_captured: float | None
    unique_hit_ratio: float | None = None
    coverage_k: float | None = None
    coverage_2k: float | None = None
    precision: float | None = None
    wasted_bytes_per_token: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it, but the last five only where they apply."""
        always = 9
        items = list(vars(self).items())
        return dict(items[:always] + [item for item in items[always:] if item[1] is not None])


def check(question: Question, traces: Mapping[str, Trace]) -> None:
    """Refuse a question before any work is done on it.

    Raises:
        OffloadError: an option that is unknown or out of range.
    """
    for policy in question.policies:
        check_policy(policy)
    for predictor in question.predictors:
        check_predictor(predictor)
    if question.batch < 1:
        raise OffloadError("--batch", question.batch, "it is no number of sequences", "Give 1 up")
    if question.expert_mb is not None and not 0 < question.expert_mb < 1e9:
        raise OffloadError("--expert-mb", question.expert_mb, "it is no size", "Give MiB above 0")
    if not 0 <= question.prefetch_mb < 1e9:
        raise OffloadError("--prefetch-mb", question.prefetch_mb, "it is no budget", "Give MiB")
    for trace in traces.values():
        for cache in question.caches:
            slots_of(trace, cache)
        if question.prefetch_mb and expert_bytes(trace.model, question.expert_mb) is None:
            raise OffloadError(
                "--prefetch-mb",
                question.prefetch_mb,
                f"the size of an expert of {trace.model} is not known here",
                "Give --expert-mb too",
            )


def answer(question: Question, traces: Mapping[str, Trace]) -> Iterator[Row]:
    """Simulate, trace by trace.

    A predictor has first learned the other traces of the same model, if there are any, and
    goes on learning after each token.
    """
    for name, trace in traces.items():
        others = [other for key, other in traces.items() if key != name and _alike(other, trace)]
        baseline = replay(trace, BASELINE, question.caches, batch=question.batch)
        bound = replay(trace, BOUND, question.caches, batch=question.batch)
        known = {BASELINE: baseline, BOUND: bound}
        for predictor in question.predictors:
            yield from _rows(question, name, trace, predictor, others, known)


def _alike(one: Trace, other: Trace) -> bool:
    shapes = ((t.model, t.num_layers, t.num_experts, t.top_k) for t in (one, other))
    return len(set(shapes)) == 1


def _rows(
    question: Question,
    name: str,
    trace: Trace,
    predictor: str,
    others: list[Trace],
    known: dict[str, Replay],
) -> Iterator[Row]:
    size = expert_bytes(trace.model, question.expert_mb)
    prefetch = int(question.prefetch_mb * MIB) // size if size and predictor != NONE else 0
    quality, guesses = _observed(predictor, trace, others, question.batch, prefetch)
    for policy in question.policies:
        if prefetch:
            if policy == BOUND:
                continue  # Knowing the future leaves nothing to predict.
            result = replay(trace, policy, question.caches, batch=question.batch, guesses=guesses)
        else:
            canonical = ENGINE_DEFAULT if policy == ALIAS else policy
            if canonical not in known:
                known[canonical] = replay(trace, policy, question.caches, batch=question.batch)
            result = known[canonical]
        for place, cache in enumerate(question.caches):
            yield Row(
                trace=name,
                policy=policy,
                predictor=predictor,
                cache=cache,
                batch=question.batch,
                hit_ratio=result.hit_ratio(place),
                accesses=result.accesses,
                bytes_per_token=_per_token(result.moved(place), size, result.tokens),
                gap_captured=_gap_captured(result, known, place),
                unique_hit_ratio=result.load_hit_ratio(place) if question.batch > 1 else None,
                **_quality(quality, result, place, size, prefetch),
            )


def _observed(
    name: str, trace: Trace, others: list[Trace], batch: int, prefetch: int
) -> tuple[Accuracy | None, Guesses | None]:
    """How good the guesses are, token by token, and those for the steps of the batch."""
    learner = make_predictor(name, trace, others)
    if learner is None:
        return None, None
    quality, guesses = observe(learner, trace, prefetch=prefetch)
    again = make_predictor(name, trace, others) if prefetch and batch > 1 else None
    if again is not None:
        _, guesses = observe(again, trace, batch=batch, prefetch=prefetch)
    return quality, guesses


def _per_token(experts: int, size: int | None, tokens: int) -> float | None:
    return None if size is None else experts * size / max(1, tokens)


def _gap_captured(result: Replay, known: Mapping[str, Replay], place: int) -> float | None:
    """Share of the way from LRU to the bound, None if there is no way to go.

    By unique loads, which the bound is the bound of; with a batch of 1 accesses are the same.
    """
    low, high = int(known[BASELINE].load_hits_C[place]), int(known[BOUND].load_hits_C[place])
    return (int(result.load_hits_C[place]) - low) / (high - low) if high > low else None


def _quality(
    quality: Accuracy | None, result: Replay, place: int, size: int | None, prefetch: int
) -> dict[str, float | None]:
    """Of guesses that were fetched, what was wasted; else what fetching them all would waste."""
    if quality is None:
        return {}
    wasted = int(result.wasted_C[place]) / max(1, result.tokens) if prefetch else quality.wasted
    return {
        "coverage_k": quality.coverage_k,
        "coverage_2k": quality.coverage_2k,
        "precision": quality.precision,
        "wasted_bytes_per_token": None if size is None else wasted * size,
    }


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """For each trace the policies, a line each and columns for each cache size; then predictors.

    Without a budget nothing is prefetched, and policies do the same beside all predictors: they are
    shown once.
    """
    by_trace: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        by_trace.setdefault(row.trace, {}).setdefault(row.predictor, []).append(row)
    for trace, groups in by_trace.items():
        first, *others = groups.values()
        if any(_hits(group) != _hits(first) for group in others):
            for predictor, group in groups.items():
                yield _policies_table(f"{trace}, predictor {predictor}", group)
        else:
            yield _policies_table(trace, first)
        guessing = {name: group for name, group in groups.items() if name != NONE}
        if guessing:
            yield _predictor_table(guessing)


def _hits(rows: Sequence[Row]) -> list[tuple[str, float]]:
    return [(row.policy, row.hit_ratio) for row in rows]


def _policies_table(what: str, rows: Sequence[Row]) -> Table:
    first = rows[0]
    title = f"{what}: {first.accesses} accesses, batch {first.batch}"
    caches = list(dict.fromkeys(row.cache for row in rows))
    by_cell = {(row.policy, row.cache): row for row in rows}
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    table.add_column("policy")
    for cache in caches:
        table.add_column(f"cache {cache:g}", justify="right")
    for policy in dict.fromkeys(row.policy for row in rows):
        label = f"{policy}*" if policy in (ENGINE_DEFAULT, ALIAS) else policy
        table.add_row(label, *(_cell(by_cell[policy, cache]) for cache in caches))
    unique = ", the same by unique loads" if first.batch > 1 else ""
    table.caption = (
        f"hit ratio{unique}, share of the gap from {BASELINE} to {BOUND}, MiB moved a token\n"
        "* the engine's default"
    )
    return table


def _cell(row: Row) -> str:
    parts = [f"{row.hit_ratio:.4f}"]
    if row.unique_hit_ratio is not None:
        parts.append(f"{row.unique_hit_ratio:.4f}")
    parts.append("   -" if row.gap_captured is None else f"{row.gap_captured:4.0%}")
    moved = row.bytes_per_token
    parts.append("     -" if moved is None else f"{moved / MIB:6.0f}")
    return " ".join(parts)


def _predictor_table(groups: Mapping[str, Sequence[Row]]) -> Table:
    table = Table("predictor", "coverage at k", "at 2k", "precision", "MiB wasted a token",
                  box=box.SIMPLE)  # fmt: skip
    for predictor, rows in groups.items():
        first = rows[0]
        # What is fetched in vain depends on the cache size, what is guessed in vain does not.
        wasted = [row.wasted_bytes_per_token for row in rows if row.policy == first.policy]
        texts = ("-" if value is None else f"{value / MIB:.0f}" for value in wasted)
        table.add_row(
            predictor,
            f"{first.coverage_k:.3f}",
            f"{first.coverage_2k:.3f}",
            f"{first.precision:.3f}",
            ", ".join(dict.fromkeys(texts)),
        )
    return table
