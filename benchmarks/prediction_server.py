"""Time decode steps on replayed routing, with one engine after the other. Called by ``jobs.py``."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import routing
import timed_server
from exchange import Exchange, find_routers_early, in_turn
from server import Server, fill_dummies_quickly
from shapes import SHAPES
from timed_server import Talk, empty_slots, quickest

from vllm_moe_offload.predictors.eam import EamPredictor
from vllm_moe_offload.predictors.figures import WINDOW
from vllm_moe_offload.predictors.markov import MarkovPredictor
from vllm_moe_offload.prefetch import MAX_TOKENS
from vllm_moe_offload.trace import Trace, load

SEED = 0
"""Of routing that nobody can guess."""

Row = dict[str, Any]


def replay(job: dict[str, Any], folder: Path, talk: Talk) -> None:
    """Time the steps of one server, such as stock vLLM's."""
    strategy = follow(job)
    server = Server(folder, SHAPES[job["shape"]], job)
    talk.wait_for_turn()
    for plan in job["measurements"]:
        talk.note(_per_second(repeated(server, plan, partial(strategy.rewind, plan["place"]))))


def compare(job: dict[str, Any], folder: Path, talk: Talk) -> None:
    """Time the same steps with each of several engines over one server's weights.

    Every engine begins at the first token of the trace with empty slots, or full ones if it shall
    move nothing, and its predictor knows another trace of the model, if there is one.
    """
    strategy = follow(job)
    find_routers_early()
    server = Server(folder, SHAPES[job["shape"]], job)
    exchange, lessons = Exchange(server.worker()), recorded(job, job["learned"])
    talk.wait_for_turn()
    numbers = count()

    def run(asked: dict[str, Any]) -> None:
        number, options = next(numbers), dict(asked["options"])
        if asked["records"]:
            options["trace_path"] = str(folder / f"traces-{number}")
        start = time.perf_counter()
        if number or options != job["settings"]["moe_offload"]:
            exchange.build(options)
        about = {"share": asked["share"], "exchange_seconds": time.perf_counter() - start}
        for row in measured(server, strategy, asked["runs"], lessons):
            talk.note({**about, **row, "said": list(exchange.said)})
        check_tables(server.offload_engine())

    in_turn(takewhile(lambda _: time.time() <= job["until"], job["engines"]), run, talk)


def follow(job: dict[str, Any]) -> routing.TraceReplay:
    """Route as a trace says, in as many of its first layers as the shape has."""
    trace = recorded(job, job["trace"])
    assert trace is not None
    ids_NLK = torch.from_numpy(trace.expert_ids.astype("int32"))
    strategy = routing.TraceReplay(ids_NLK, spread=True)
    routing.register(strategy)
    fill_dummies_quickly()
    return strategy


def recorded(job: dict[str, Any], path: str | None) -> Trace | None:
    """A trace's layers as far as the shape has them."""
    if path is None:
        return None
    trace = load(path)
    layers = SHAPES[job["shape"]].moe_layers
    return dataclasses.replace(trace, expert_ids=trace.expert_ids[:, :layers])


def measured(
    server: Server,
    strategy: routing.TraceReplay,
    runs: list[dict[str, Any]],
    lessons: Trace | None,
) -> Iterator[Row]:
    """Rows of an engine, on the trace or on routing that nobody can guess."""
    for run in runs:
        strategy.scramble(SEED if run["uniform"] else None)
        begin_anew = partial(start_over, server, strategy, lessons, fills=run["fills"])
        if run["settle"]:
            begin_anew()
            server.decode(1, 1, run["settle"])
        for plan in run["measurements"]:
            row = repeated(server, plan, begin_anew)
            yield {"configuration": run["name"], "uniform": run["uniform"], **_per_second(row)}


def repeated(server: Server, plan: dict[str, Any], begin: Callable[[], None]) -> Row:
    """The quickest of several times, each of which begins alike and does exactly the same."""

    def once() -> Row:
        return server.decode(plan["batch"], plan["steps"], plan["warm_up"], begin=begin)

    return quickest(once, plan["repeat_seconds"], most=float("inf"))


def start_over(
    server: Server, strategy: routing.TraceReplay, lessons: Trace | None, *, fills: bool
) -> None:
    """Go back to the first token, with nothing learned but ``lessons``, all slots empty or full."""
    strategy.rewind()
    engine = server.offload_engine()
    empty_slots(engine)
    if fills:
        fill_slots(engine)
    if lessons is not None and engine.predictor is not None:
        teach(engine.predictor, lessons)


def teach(predictor: Any, lessons: Trace) -> None:
    """Let a predictor learn a trace as if the engine had run it."""
    if isinstance(predictor, MarkovPredictor):
        ids_LNK = torch.from_numpy(lessons.expert_ids.astype("int32").transpose(1, 0, 2))
        for ids_LTK in ids_LNK.to(predictor.tables.use_LE.device).split(MAX_TOKENS, dim=1):
            predictor.learn(ids_LTK.contiguous(), ids_LTK.shape[1])
        predictor.make_evidence()
    if isinstance(predictor, EamPredictor):
        for ids_NLK in windows(lessons):
            uses = [np.bincount(ids_NK.ravel(), minlength=lessons.num_experts)
                    for ids_NK in ids_NLK.transpose(1, 0, 2)]  # fmt: skip
            predictor.add(np.stack(uses))


def windows(trace: Trace) -> Iterator[Any]:
    """Ids of what makes up a matrix: some tokens of one sequence."""
    for first, end in pairwise(trace.sequence_starts.tolist()):
        for start in range(first, end - WINDOW // 2 + 1, WINDOW):
            yield trace.expert_ids[start : min(start + WINDOW, end)]


def fill_slots(engine: Any) -> None:
    """Load all experts that have room."""
    engine.fill_slots([np.ones(spec.routing.num_experts) for spec in engine.specs])


def check_tables(engine: Any) -> None:
    """Raise unless what the engine knows of its slots agrees with itself."""
    for layer in range(len(engine.specs)):
        engine.residency(layer).check_integrity()


def _per_second(row: Row) -> Row:
    return {**row, "tokens_per_second": row["batch"] / row["seconds"]}


if __name__ == "__main__":
    timed_server.KINDS |= {"replay": replay, "compare": compare}
    sys.exit(timed_server.main())
