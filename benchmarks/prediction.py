"""The suite ``prediction``: eviction and predictors on replayed routing, against stock vLLM.

Every token that the model runs is routed as a token of a trace, each sequence of a batch along its
own stretch of it. The router's own weights are random then, so ``gate`` guesses at random here: it
shows what useless guesses cost, not what a gate finds.
"""

from pathlib import Path
from typing import Any

from shapes import SHAPES
from suites import cpu_offload, decode, plugin

SHARES = (0.25, 0.5)
BATCHES = (1, 8, 32)
MIB = 1 << 20

CONTROL_STEPS = 512
"""Steps after which ``prefetch_mb=auto`` has decided."""

MAX_TOKENS = 1024
"""Of a sequence: more than any is decoded here."""

STOCK_TARGET = 2.5
"""Times stock vLLM's rate at batch 1 with a quarter in slots."""

USELESS_TARGET = 1.02
"""Times the step without a predictor, for useless guesses."""

Job = dict[str, Any]


def shape_of(path: Path) -> str:
    """The shape whose layers and choices are those of a trace."""
    from vllm_moe_offload.trace import load

    trace = load(path)
    wanted = (trace.num_layers, trace.num_experts, trace.top_k)
    found = (name for name, shape in SHAPES.items()
             if (shape.moe_layers, shape.num_experts, shape.top_k) == wanted)  # fmt: skip
    return next(found)


def prediction(name: str, options: dict[str, Any], path: str = "") -> list[Job]:
    """Each eviction policy, each predictor, and stock vLLM, at the same shares.

    Args:
        name: a shape with as many layers and choices as the trace.
        options: of the plugin, in all configurations.
        path: the trace.
    """
    tiny = name.startswith("tiny")
    steps = 4 if tiny else 24
    plans = [decode(batch, steps, 8 if tiny else 64) for batch in BATCHES]
    alone = [decode(1, steps if tiny else 128, CONTROL_STEPS)]
    one = {"prefetch_mb": SHAPES[name].expert_bytes * (2 if tiny else 1) / MIB}
    jobs = []
    for share in SHARES:
        asked = [
            (f"lru {share}", plans, _policy("lru")),
            (f"adaptive {share}", plans, _policy("adaptive")),
            *((f"{p} {share}", plans, {"predictor": p, **one}) for p in ("markov", "eam", "gate")),
        ]
        if share == min(SHARES):
            asked += [
                (f"none, one sequence {share}", alone, {}),
                *((f"{p} auto {share}", alone, {"predictor": p}) for p in ("markov", "gate")),
            ]
        jobs += [
            {**plugin(share, name, wanted, {**options, **special}), "name": label}
            for label, wanted, special in asked
            if special is not None
        ]
        jobs.append(cpu_offload(share, name, [decode(batch, 6, 3) for batch in BATCHES]))
    for job in jobs:
        job["settings"]["max_model_len"] = MAX_TOKENS
    return [{**job, "kind": "replay", "trace": path} for job in jobs]


def _policy(name: str) -> dict[str, Any] | None:
    """Options of an eviction policy; None where there is no choice of it."""
    from vllm_moe_offload.config import MoeOffloadConfig

    if "policy" in MoeOffloadConfig.model_fields:
        return {"policy": name}
    return {} if name == "lru" else None


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the suite promises, from the rows that were measured."""
    seconds = {
        row["configuration"]: row["seconds"]
        for row in rows
        if row.get("case") == "decode" and row["batch"] == 1
    }

    def ratio(of: str, to: str) -> float | None:
        return seconds[of] / seconds[to] if of in seconds and to in seconds else None

    best = min((name for name in ("lru 0.25", "adaptive 0.25") if name in seconds),
               key=lambda name: seconds[name], default="lru 0.25")  # fmt: skip
    faster = ratio("cpu-offload 0.25", best)
    share = min(SHARES)
    costs = {f"share {share}": ratio(f"gate auto {share}", f"none, one sequence {share}")}
    known = [cost for cost in costs.values() if cost is not None]
    return [
        {
            "case": "batch 1, a quarter in slots, against stock",
            "target": f"at least {STOCK_TARGET} times as fast",
            "values": {best: faster},
            "passed": None if faster is None else faster >= STOCK_TARGET,
        },
        {
            "case": "useless guesses, auto, batch 1",
            "target": f"at most {USELESS_TARGET} of a step without",
            "values": costs,
            "passed": None if not known else max(known) <= USELESS_TARGET,
        },
    ]
