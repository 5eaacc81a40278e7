"""The suite ``budget``: experts and KV cache in one budget, against splits that are made once.

    python benchmarks/run.py --suite budget --together 4 --out benchmarks/results/budget.json

A third of Qwen3-30B-A3B, 16 of its 48 layers, with a third of what a card of 24 GB leaves it:
5.6 GiB for KV cache and expert slots together, after dense weights, staging, activations and
graphs. So slots, blocks and the bytes of a step stand to each other as in the whole model, and all
times are a third. Routing is skewed as that of real models is.

One server lives through phases: a chat user, 64 concurrent prompts of 4096 tokens, a document of
100,000 tokens, and the chat user again. The plugin's default is set beside servers of the same
budget that are split once (``kv_policy=fixed``), experts having none, a half, or all of what the
floor allows.
"""

import json
import time
from pathlib import Path
from typing import Any

import jobs
from shapes import SHAPES, Shape

SERVER = Path(__file__).with_name("budget_server.py")

GIB, MIB = 1 << 30, 1 << 20

BUDGET_SHAPES = {
    "qwen3-30b-a3b-16-long": Shape(16, 128, 8, 2048, 768, 32, 4, positions=131_072),
    "tiny-long": Shape(4, 16, 4, 128, 64, 4, 2, head_dim=32, vocabulary=512),
}

FLOOR = 0.1
"""The default of ``kv_floor``."""

SPLITS = (0.0, 0.5, 1.0)
"""Shares of what experts can have, in servers that are split once."""

NEAR_BEST, IDLE_TO_FULL_S, STALL_S, LAYOUT_COST = 1.05, 2.0, 0.005, 1.02

LAYOUT_CASES = {(1, 32_768), (32, 32_768)}
"""Sequences of a step and tokens of each, at the least."""

Job = dict[str, Any]
Row = dict[str, Any]


def sizes(tiny: bool) -> dict[str, Any]:
    """What the phases are made of, in tokens and requests."""
    if tiny:
        return {
            "kv_bytes": 3 * MIB, "max_model_len": 640, "chunk": 128, "turns": 2, "question": 20,
            "answer": 8, "users": 24, "prompt": 100, "short_answer": 4, "document": 500,
            "recall": 64,
        }  # fmt: skip
    return {
        "kv_bytes": int(5.6 * GIB), "max_model_len": 102_400, "chunk": 8192, "turns": 4,
        "question": 200, "answer": 96, "users": 64, "prompt": 4096, "short_answer": 8,
        "document": 100_000, "recall": 64,
    }  # fmt: skip


def budget(name: str, options: dict[str, Any]) -> list[Job]:
    """The default, the splits, and what the layout costs attention.

    Args:
        name: a shape.
        options: of the plugin, in all configurations.
    """
    tiny = name.startswith("tiny")
    asked = [_server("auto", name, {"kv_policy": "auto", **options})]
    for share in SPLITS:
        floor = floor_for(share, BUDGET_SHAPES[name], sizes(tiny))
        asked.append(
            _server(
                f"fixed {share:.2f}", name, {"kv_policy": "fixed", "kv_floor": floor, **options}
            )
        )
    layout = {"name": "layout", "kind": "layout", "server": "layout", "share": 0.0, "shape": name}
    # It runs last, when all servers are gone, and takes its memory only then.
    return [*asked, {**layout, "needs": (GIB, GIB), "tiny": tiny}]


def floor_for(share: float, shape: Shape, size: dict[str, Any]) -> float:
    """The ``kv_floor`` that leaves experts this share of what the default leaves them."""
    sequence = size["max_model_len"] * token_bytes(shape) / size["kv_bytes"]
    return 1.0 - sequence - share * (1.0 - FLOOR - sequence) if share else 1.0


def token_bytes(shape: Shape) -> int:
    """Bytes of one token's keys and values in all layers, in 16 bits."""
    return shape.num_layers * 2 * shape.kv_heads * shape.head_dim * 2


def _server(label: str, name: str, offload: dict[str, Any]) -> Job:
    tiny, shape = name.startswith("tiny"), BUDGET_SHAPES[name]
    size = sizes(tiny)
    settings: dict[str, Any] = {
        "kv_cache_memory_bytes": size["kv_bytes"],
        "max_model_len": size["max_model_len"],
        "max_num_batched_tokens": size["chunk"],
        "max_num_seqs": 64,
        "enable_prefix_caching": True,
        "gpu_memory_utilization": 0.05,  # of no meaning beside the size above, but checked
        "plugin": "moe-offload",
        "moe_offload": {"stats_interval_s": 0, **offload},
    }
    if tiny:
        settings |= {"dtype": "bfloat16", "enforce_eager": True, "block_size": 32}
    else:
        settings["compilation_config"] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 48, 64]}
    return {
        "name": label, "kind": "phases", "server": "plugin", "share": 0.0, "shape": name,
        "settings": settings, "size": size,
        "needs": (size["kv_bytes"] + 6 * GIB, shape.pool_bytes + 4 * GIB),
    }  # fmt: skip


def measure(
    out: Path,
    shape: str,
    options: dict[str, Any],
    origin: dict[str, Any],
    *,
    only: list[str] | None = None,
    together: int = 1,
) -> dict[str, Any]:
    """Run the suite; the file and the plot beside it hold what there is after each process.

    Args:
        out: where the result goes.
        shape: of ``BUDGET_SHAPES``.
        options: of the plugin.
        origin: where and of what the result is.
        only: names of configurations; those of an earlier result are kept.
        together: servers that start at once; one is measured.
    """
    import budget_plot

    jobs.SCRIPT = str(SERVER)
    SHAPES.update(BUDGET_SHAPES)
    asked = [job for job in budget(shape, options) if not only or job["name"] in only]
    names = {job["name"] for job in asked}
    earlier = json.loads(out.read_text()) if only and out.exists() else {}
    processes, phases = (
        [entry for entry in earlier.get(part, []) if entry["configuration"] not in names]
        for part in ("processes", "phases")
    )
    result: dict[str, Any] = {}
    start = time.monotonic()
    for done in jobs.run_all(asked, jobs.Memory.of_this_machine(together)):
        phases += done.pop("rows")
        processes.append(done)
        state = "done" if done["exit"] == 0 else f"FAILED ({done['exit']})\n{done['log']}"
        print(f"[{time.monotonic() - start:4.0f} s] {done['configuration']}: {state}", flush=True)
        result = {
            **origin,
            "suite": "budget",
            "copy_gb_s": [p["copy_gb_s"] for p in processes if p["copy_gb_s"]],
            "shapes": {shape: BUDGET_SHAPES[shape].as_dict()},
            "sizes": sizes(shape.startswith("tiny")),
            "targets": verdicts(phases),
            "rows": [],
            "phases": phases,
            "processes": processes,
        }
        out.write_text(json.dumps(result, indent=1) + "\n")
        budget_plot.draw(result, out.with_suffix(".svg"))
    return result


def verdicts(rows: list[Row]) -> list[dict[str, Any]]:
    """What the suite promises, from the rows that were measured."""
    seconds = _seconds(rows)
    auto = seconds.pop("auto", {})
    fixed = {name: times for name, times in seconds.items() if times.keys() == auto.keys()}
    return [
        _beside_best(auto, fixed),
        _beside_each(auto, fixed),
        _waits(rows),
        *_recall(rows),
        _layout(rows),
    ]


def _recall(rows: list[Row]) -> list[dict[str, Any]]:
    (found,) = [row for row in rows if row["case"] == "recall"] or [{}]
    # From a server that had lent less, or nothing, it would say nothing.
    is_whole = found and found["increments"] == found["most_increments"] > 0
    whole = found if is_whole else {}
    return [
        _at_most("idle to the whole KV cache, s", IDLE_TO_FULL_S, whole.get("seconds")),
        _at_most("longest move on the device, s", STALL_S, whole.get("longest_move_s")),
        _at_most("longest decision of the scheduler, s", STALL_S, whole.get("longest_decision_s")),
    ]


def _layout(rows: list[Row]) -> dict[str, Any]:
    found = {(r["batch"], r["context"]): r["cost"] for r in rows if r["case"] == "layout"}
    return {
        "case": "attention, blocks outermost over layers outermost",
        "target": f"at most {LAYOUT_COST}",
        "values": {f"{batch} x {context}": cost for (batch, context), cost in found.items()},
        "passed": max(found.values()) <= LAYOUT_COST if found.keys() >= LAYOUT_CASES else None,
    }


def _seconds(rows: list[Row]) -> dict[str, dict[str, float]]:
    """By configuration and phase."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["case"] == "phase":
            found.setdefault(row["configuration"], {})[row["phase"]] = row["seconds"]
    return found


def _beside_best(auto: dict[str, float], fixed: dict[str, dict[str, float]]) -> dict[str, Any]:
    ratio = None
    if auto and fixed:
        best = sum(min(times[phase] for times in fixed.values()) for phase in auto)
        ratio = sum(auto.values()) / best
    return _at_most("all phases, over the best split of each phase", NEAR_BEST, ratio)


def _beside_each(auto: dict[str, float], fixed: dict[str, dict[str, float]]) -> dict[str, Any]:
    total = sum(auto.values())
    ratios = {name: total / sum(times.values()) for name, times in fixed.items()}
    return {
        "case": "all phases, over every split",
        "target": "below 1",
        "values": ratios,
        "passed": max(ratios.values()) < 1 if ratios else None,
    }


def _waits(rows: list[Row]) -> dict[str, Any]:
    """Of each phase the request that waits longest over what it waits without any slots."""
    waits = {
        (row["configuration"], row["phase"]): row["waits_s"]
        for row in rows
        if row["case"] == "phase"
    }
    floor = f"fixed {0:.2f}"
    ratios = {
        phase: max(one / other for one, other in zip(mine, waits[floor, phase], strict=True))
        for (name, phase), mine in waits.items()
        if name == "auto" and (floor, phase) in waits
    }
    return {
        "case": "a request's wait for its first token, over that without slots",
        "target": "at most 1",
        "values": ratios,
        "passed": max(ratios.values()) <= 1 if ratios else None,
    }


def _at_most(case: str, limit: float, value: float | None) -> dict[str, Any]:
    passed = None if value is None else value <= limit
    return {"case": case, "target": f"at most {limit}", "values": {"": value}, "passed": passed}
