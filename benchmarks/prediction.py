"""The suite ``prediction``: eviction and predictors on replayed routing, against stock vLLM.

    python benchmarks/run.py --suite prediction --together 3 --trace TRACE.npz --out FILE

With ``--learned OTHER.npz`` predictors know another trace of the model from before.

Every token that the model runs is routed as a token of a trace, each sequence of a batch along its
own stretch of it. A shape of fewer layers follows the trace's first ones. One server has all
engines in turn, over one host pool, and each begins every batch with empty slots and nothing
learned at the trace's first token: all take the very same steps, and no token twice. The router's
own weights are random, so ``gate`` guesses at random: it shows what useless guesses cost, not what
a gate finds. To judge that, routing is uniform as well.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jobs
from shapes import SHAPES
from suites import cpu_offload, decode, plugin

SERVER = Path(__file__).with_name("prediction_server.py")

SHARES = (0.25, 0.5)
MIB = 1 << 20

STEPS = {1: (64, 48), 8: (8, 8), 32: (4, 6)}
"""By batch: steps of warm-up, in which policies and predictors learn, and steps that count. Fewer
of both where a sequence's stretch of the trace is shorter, so that no token is run twice."""

FEW_STEPS = {1: (4, 3), 8: (2, 2), 32: (1, 2)}
"""The same where it is only tried out."""

STOCK_WARM_UP = 3
"""vLLM's own offloading keeps the same layers in every step."""

QUICK_S, EXACT_S = 2.0, 6.0
"""For how long the same steps are repeated. Longer where a percent is judged at batch 1, where host
noise shows."""

MAX_TOKENS = 1024
"""Of a sequence: more than any is decoded here."""

WHOLE = "all in slots"
"""The engine that moves nothing: its steps take what the computation takes."""

PLAIN, RECORDED = "adaptive 0.25", "adaptive 0.25, recorded"
UNIFORM, USELESS = "adaptive 0.25, uniform routing", "gate auto 0.25, uniform routing"

STOCK_TARGET = 2.5
"""Times stock vLLM's rate at batch 1 with a quarter in slots, on a trace of Qwen3."""

USELESS_TARGET = 1.02
"""Times the step without a predictor, for useless guesses."""

RECORDED_TARGET = 1.01
"""Times the step without a recorder at batch 1."""

Job = dict[str, Any]
Row = dict[str, Any]


def shape_of(path: Path) -> str:
    """The shape whose layers and choices are those of a trace."""
    from vllm_moe_offload.trace import load

    trace = load(path)
    wanted = (trace.num_layers, trace.num_experts, trace.top_k)
    found = (name for name, shape in SHAPES.items()
             if (shape.moe_layers, shape.num_experts, shape.top_k) == wanted)  # fmt: skip
    return next(found)


def steps_of(batch: int, tokens: int | None, tiny: bool = False) -> tuple[int, int]:
    """Steps of warm-up and steps that count, within a sequence's stretch of so many tokens.

    Args:
        batch: sequences, which share the trace out among them.
        tokens: of the trace; None for one that is long enough.
        tiny: for a server that is only tried out.
    """
    warm_up, steps = (FEW_STEPS if tiny else STEPS)[batch]
    if tokens is None or warm_up + steps <= tokens // batch:
        return warm_up, steps
    stretch = tokens // batch
    if stretch < 2:
        sys.exit(f"--trace: {tokens} tokens are too few for {batch} sequences of 2 at least")
    counted = max(1, stretch * steps // (warm_up + steps))
    return stretch - counted, counted


def prediction(
    name: str,
    options: dict[str, Any],
    path: str = "",
    learned: str | None = None,
    *,
    tokens: int | None = None,
) -> list[Job]:
    """Stock vLLM at the same shares, and the server whose engines are exchanged.

    The latter comes last: all experts are in slots once, for which the others must have ended.

    Args:
        name: a shape with as many choices as the trace, and no more layers.
        options: of the plugin, in all configurations.
        path: the trace.
        learned: another trace of the model, which predictors know from before.
        tokens: of the trace; None for one that is long enough for all steps.
    """
    found = engines(name, options, tokens)
    batches = [plan for run in found[0]["runs"] for plan in run["measurements"]]
    ours = plugin(SHARES[0], name, batches, options)
    ours["settings"]["moe_offload"] = found[0]["options"]
    stock = [_stock_plan(*plan) for plan in _plans(name.startswith("tiny"), tokens)]
    asked = [
        *({**cpu_offload(share, name, stock), "kind": "replay"} for share in SHARES),
        {**ours, "name": "plugin", "kind": "compare", "engines": found, "until": float("inf")},
    ]
    for job in asked:
        job["settings"]["max_model_len"] = MAX_TOKENS
    return [{**job, "trace": path, "learned": learned} for job in asked]


def _plans(tiny: bool, tokens: int | None) -> list[tuple[int, int, int]]:
    """Of every batch the steps of warm-up and those that count."""
    return [(batch, *steps_of(batch, tokens, tiny)) for batch in STEPS]


def _stock_plan(batch: int, warm_up: int, steps: int) -> Job:
    """The steps that count of the engines', and only some before them."""
    few = min(STOCK_WARM_UP, warm_up)
    plan = decode(batch, steps, few)
    return {**plan, "place": warm_up - few, "repeat_seconds": QUICK_S}


def engines(name: str, options: dict[str, Any], tokens: int | None = None) -> list[Job]:
    """Engines in the order of what must not be missing if time runs out."""
    tiny = name.startswith("tiny")
    one = {"prefetch_mb": SHAPES[name].expert_bytes * (2 if tiny else 1) / MIB}
    policies = {p: {"policy": p} for p in ("lru", "adaptive")}
    predictors = {p: {"predictor": p, **one} for p in ("markov", "eam", "gate")}
    settle = 8 if tiny else steps_to_decide()
    run = partial(_run, _plans(tiny, tokens), tiny)

    def engine(label: str, share: float, special: Job, *runs: Job, records: bool = False) -> Job:
        chosen = {"cache_fraction": share, "stats_interval_s": 0, **options, **special}
        runs = runs or (run(label),)
        return {"name": label, "share": share, "options": chosen, "runs": runs, "records": records}

    quarter, half = SHARES
    ours = [engine(f"{p} {quarter}", quarter, o) for p, o in policies.items()]
    ours[-1]["runs"] = (run(PLAIN, EXACT_S), run(UNIFORM, EXACT_S, uniform=True))
    ours += [engine(f"{p} {half}", half, o) for p, o in policies.items()]
    ours += [engine(f"{p} {quarter}", quarter, o) for p, o in predictors.items()]
    ours += [
        engine(RECORDED, quarter, {}, run(RECORDED, EXACT_S), records=True),
        engine(
            USELESS, quarter, {"predictor": "gate"},
            run(USELESS, EXACT_S, uniform=True, settle=settle),
        ),
        engine(
            f"markov auto {quarter}", quarter, {"predictor": "markov"},
            run(f"markov auto {quarter}", settle=settle),
        ),
    ]  # fmt: skip
    ours += [engine(f"{p} {half}", half, o) for p, o in predictors.items()]
    return [*ours, engine(WHOLE, 1.0, {}, run(WHOLE, fills=True))]


def steps_to_decide() -> int:
    """Steps after which ``prefetch_mb=auto`` has decided for the first time."""
    from vllm_moe_offload import prefetch_control as control

    return control.LEARNING_STEPS + control.STEPS_OF_TRIAL + control.TURN


def _run(
    plans: list[tuple[int, int, int]],
    tiny: bool,
    label: str,
    seconds: float = QUICK_S,
    *,
    uniform: bool = False,
    settle: int = 0,
    fills: bool = False,
) -> Job:
    """One pass over all batches, each from the trace's first token on with nothing learned."""
    measurements = []
    for batch, warm_up, steps in plans:
        repeats = seconds if batch == 1 else QUICK_S
        plan = {**decode(batch, steps, warm_up), "repeat_seconds": 0.0 if tiny else repeats}
        measurements.append(plan)
    about = {"name": label, "uniform": uniform, "settle": settle, "fills": fills}
    return {**about, "measurements": measurements}


def names(asked: list[Job]) -> list[str]:
    """Of all configurations: servers of one engine, and engines."""
    return [part["name"] for job in asked for part in job.get("engines", [job])]


def only(asked: list[Job], wanted: list[str] | None) -> list[Job]:
    """The same jobs with nothing but these configurations; None for all."""
    if not wanted:
        return asked
    kept = [
        {**job, "engines": [e for e in job["engines"] if e["name"] in wanted]}
        if "engines" in job else job
        for job in asked
    ]  # fmt: skip
    return [job for job in kept if job.get("engines") or job["name"] in wanted]


def measure(
    out: Path,
    asked: list[Job],
    origin: dict[str, Any],
    *,
    together: int = 1,
    minutes: float | None = None,
    fresh: bool = True,
) -> dict[str, Any]:
    """Run the suite; the file holds what there is after each process.

    Args:
        out: where the result goes.
        asked: jobs of this suite.
        origin: where and of what the result is.
        together: servers that start at once; one is measured.
        minutes: no engine begins later than that, counted from now.
        fresh: whether what the file holds of other configurations is left out.
    """
    jobs.SCRIPT = str(SERVER)
    start = time.monotonic()
    for job in asked:
        job["until"] = time.time() + 60 * minutes if minutes else 1e12
    earlier = {} if fresh or not out.exists() else json.loads(out.read_text())
    again = {*names(asked), *(job["name"] for job in asked)}
    processes, rows = (
        [entry for entry in earlier.get(part, []) if entry["configuration"] not in again]
        for part in ("processes", "rows")
    )
    result: dict[str, Any] = {}
    for done in jobs.run_all(asked, jobs.Memory.of_this_machine(together)):
        rows += done.pop("rows")
        processes.append(done)
        state = "done" if done["exit"] == 0 else f"FAILED ({done['exit']})\n{done['log']}"
        print(f"[{time.monotonic() - start:4.0f} s] {done['configuration']}: {state}", flush=True)
        judged = set_beside(rows)
        result = {
            **origin,
            "suite": "prediction",
            "trace": Path(asked[0]["trace"]).stem,
            "learned": asked[0]["learned"] and Path(asked[0]["learned"]).stem,
            "steps": _steps_asked(asked),
            "copy_gb_s": [p["copy_gb_s"] for p in processes if p["copy_gb_s"]],
            "shapes": {job["shape"]: SHAPES[job["shape"]].as_dict() for job in asked},
            "targets": verdicts(judged),
            "rows": judged,
            "processes": processes,
        }
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _steps_asked(asked: list[Job]) -> dict[int, int]:
    """By batch: steps from the trace's first token on, each of other tokens."""
    return {
        plan["batch"]: plan.get("place", 0) + plan["warm_up"] + plan["steps"]
        for plan in asked[0]["measurements"]
    }


def set_beside(rows: list[Row]) -> list[Row]:
    """Give rows their rate over stock vLLM's, and the share of their transfers that is hidden.

    A step takes as long as its computation, known from the engine that moves nothing, and its
    transfers where they are not hidden. What transfers take was measured when the engine started.
    """
    computed = {row["batch"]: row["seconds"] for row in rows if row["configuration"] == WHOLE}
    stock = {(r["share"], r["batch"]): r["seconds"] for r in rows if r["server"] == "cpu-offload"}
    judged = []
    for row in rows:
        new = dict(row)
        base, transfer = computed.get(row["batch"]), row.get("transfer_seconds")
        if base is not None and transfer:
            hidden = (base + transfer - row["seconds"]) / transfer
            new["hidden"] = min(1.0, max(0.0, hidden))
        offloaded = stock.get((row["share"], row["batch"]))
        if row["server"] == "plugin" and offloaded is not None and not row["uniform"]:
            new["of_stock"] = offloaded / row["seconds"]
        judged.append(new)
    return judged


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """What the suite promises, from the rows that were measured."""
    seconds = {(row["configuration"], row["batch"]): row["seconds"] for row in rows}

    def ratio(of: str, to: str, batch: int) -> float | None:
        pair = seconds.get((of, batch)), seconds.get((to, batch))
        return None if None in pair else pair[0] / pair[1]  # type: ignore[operator]

    useless = {f"batch {batch}": ratio(USELESS, UNIFORM, batch) for batch in STEPS}
    found = [
        _at_most(USELESS_TARGET, "useless guesses (uniform routing, auto)", "without", useless),
        _at_most(RECORDED_TARGET, "recorder", "without", {"batch 1": ratio(RECORDED, PLAIN, 1)}),
    ]
    if any("qwen3" in row["shape"] for row in rows):
        found.insert(0, _against_stock(rows))
    return found


def _against_stock(rows: list[Row]) -> dict[str, Any]:
    policies = [row for row in rows if row["configuration"] in (PLAIN, "lru 0.25")]
    values = {r["configuration"]: r["of_stock"] for r in policies if r["batch"] == 1 and
              "of_stock" in r}  # fmt: skip
    return {
        "case": "batch 1, a quarter in slots, against stock --cpu-offload-gb",
        "target": f"at least {STOCK_TARGET} times as fast",
        "values": values,
        "passed": max(values.values()) >= STOCK_TARGET if values else None,
    }


def _at_most(
    limit: float, case: str, beside: str, values: dict[str, float | None]
) -> dict[str, Any]:
    known = [value for value in values.values() if value is not None]
    failed = any(value > limit for value in known)
    passed = False if failed else True if known and len(known) == len(values) else None
    target = f"at most {limit} of a step {beside}"
    return {"case": case, "target": target, "values": values, "passed": passed}
