"""Measure quantised experts against stock vLLM's backends for the same format, in one run.

    python benchmarks/run.py --suite quant --together 9 --out benchmarks/results/quant.json

For every shape of ``quant_shapes.py`` a server of each backend of stock vLLM, all experts on the
GPU, and one with the plugin, whose engine is exchanged for one with another share in slots. A time
of the plugin is set beside that of the stock backend which was fastest in the case. Shapes take
turns on the GPUs that there are, so that what is compared ran on the same one.
"""

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import jobs
from quant_shapes import QUANT_SHAPES
from requirements import Requirement, label, set_beside_bounds, value_of
from shapes import SHAPES
from suites import Job, Plan, chunk_of, decode, job, plugin, prefill

BATCHES = (1, 8, 32, 128)
SHARES = (1.0, 0.25)
SERVER = Path(__file__).with_name("quant_server.py")
TIME_LIMIT = 420.0
"""Seconds of one process: backends that repack or compile kernels take their time."""

PADDING = 1.01
"""Bytes that a missed expert may move, by those that the checkpoint has for it."""

Row = dict[str, Any]


def names(*, tiny: bool = False) -> list[str]:
    """Names of the real shapes in the order of what must not be missing, or of the tiny ones."""
    return [name for name in QUANT_SHAPES if name.startswith("tiny") == tiny]


def quant(name: str, options: dict[str, Any], gpu: int = 0) -> list[Job]:
    """What the table of targets needs, on one shape."""
    shape, tiny = QUANT_SHAPES[name], name.startswith("tiny")
    found = []
    for backend in shape.backends:
        asked = job(f"{name}, stock {backend}", "resident", 1.0, name, _plans(name))
        asked["settings"] |= {} if backend == "auto" else {"moe_backend": backend}
        found.append(asked)
    engines = [
        {
            "name": f"{name}, plugin {share}",
            "share": share,
            "options": plugin(share, name, [], options)["settings"]["moe_offload"],
        }
        for share in SHARES
    ]
    ours = plugin(SHARES[0], name, _plans(name), options)
    found.append({**ours, "name": f"{name}, plugin", "kind": "shares", "engines": engines})
    for each in found:
        each["gpu"] = gpu
        if tiny:
            each["settings"]["dtype"] = "bfloat16"
    return found


def _plans(name: str) -> list[Plan]:
    tiny = name.startswith("tiny")
    # Large batches move as much in one step as small ones in many.
    counts = {batch: 4 if tiny else 24 if batch <= 8 else 10 for batch in BATCHES}
    found = [decode(batch, count) for batch, count in counts.items()]
    return [*found, prefill(chunk_of(name), 1 if tiny else 3)]


def only(asked: Sequence[Job], wanted: Sequence[str] | None) -> list[Job]:
    """The same jobs with nothing but these configurations or shapes; None for all."""
    if not wanted:
        return list(asked)
    kept = []
    for each in asked:
        if {each["name"], each["shape"]} & set(wanted):
            kept.append(each)
        elif engines := [e for e in each.get("engines", []) if e["name"] in wanted]:
            kept.append({**each, "engines": engines})
    return kept


def configurations(asked: Iterable[Job]) -> list[str]:
    """What has rows of its own: servers of one engine, and engines."""
    return [part["name"] for job in asked for part in job.get("engines", [job])]


def requirements(chunk: int) -> list[Requirement]:
    """The targets: shares in slots against the fastest stock backend and the link."""
    resident = "t / t_res"
    added, larger = "(t_res + bytes / BW) / t", "max(t_res, bytes / BW) / t"
    quarter = (0.25,)
    return [
        Requirement(
            "100 % in slots, decode batch 1 / 8 / 32", "decode", (1, 8, 32), resident, 1.10
        ),
        Requirement("25 % in slots, decode batch 1 and 8", "decode", (1, 8), added, 0.90, quarter),
        Requirement("25 %, decode batch 32 and 128", "decode", (32, 128), larger, 0.85, quarter),
        Requirement(f"25 %, {chunk}-token prefill", "prefill", (chunk,), larger, 0.92, quarter),
    ]


def fastest(rows: Iterable[Row]) -> list[Row]:
    """Leave of the stock rows of a case the one with the shortest time."""
    kept: dict[Any, Row] = {}
    others = []
    for row in rows:
        if row["server"] != "resident" or row["case"] == "start":
            others.append(row)
            continue
        case = row["shape"], row["case"], row.get("batch"), row.get("tokens")
        if case not in kept or row["seconds"] < kept[case]["seconds"]:
            kept[case] = row
    return [*kept.values(), *others]


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """Every target of every shape, with the values and whether they keep it; None if unknown."""
    table = []
    for name in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == name]
        for requirement in requirements(chunk_of(name)):
            found = [row for row in mine if requirement.covers(row)]
            values = {label(row): value_of(requirement, row) for row in found}
            known = [v for v in values.values() if v is not None]
            kept = all(requirement.holds(v) for v in known)
            complete = len(known) == requirement.cases
            table.append(
                {
                    "case": f"{name}: {requirement.text}",
                    "target": requirement.target,
                    "values": values,
                    "passed": kept if complete or not kept else None,
                }
            )
        if not name.startswith("tiny"):  # whose rows are a few pages
            table.append(_padding(name, mine))
    return table


def _padding(name: str, rows: list[Row]) -> dict[str, Any]:
    sizes = {row["row_bytes"] for row in rows if "row_bytes" in row}
    stored = QUANT_SHAPES[name].expert_bytes
    return {
        "case": f"{name}: bytes of a missed expert by those of the checkpoint",
        "target": f"at most {PADDING}",
        "values": {f"{size:.0f} of {stored}": size / stored for size in sizes},
        "passed": all(size <= PADDING * stored for size in sizes) if sizes else None,
    }


def measure(
    out: Path,
    asked: Sequence[Job],
    origin: dict[str, Any],
    *,
    together: int = 1,
    fresh: bool = True,
) -> dict[str, Any]:
    """Run the suite; the file holds what there is after each process.

    Args:
        out: where the result goes.
        asked: jobs of this suite.
        origin: where and of what the result is.
        together: servers that start at once; one is measured.
        fresh: whether what the file holds of other configurations is left out.
    """
    jobs.SCRIPT = str(SERVER)
    SHAPES.update(QUANT_SHAPES)
    earlier = {} if fresh or not out.exists() else json.loads(out.read_text())
    again = {*configurations(asked), *(job["name"] for job in asked)}
    processes, rows = (
        [entry for entry in earlier.get(part, []) if entry["configuration"] not in again]
        for part in ("processes", "all_rows")
    )
    result: dict[str, Any] = {}
    start = time.monotonic()
    for done in jobs.run_all(asked, jobs.Memory.of_this_machine(together), time_limit=TIME_LIMIT):
        rows += done.pop("rows")
        processes.append(done)
        state = "done" if done["exit"] == 0 else f"failed ({done['exit']})\n{done['log']}"
        print(f"[{time.monotonic() - start:4.0f} s] {done['configuration']}: {state}", flush=True)
        result = {**origin, "suite": "quant", **judged(rows, processes), "processes": processes}
        out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def judged(rows: list[Row], processes: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows beside their bounds, and what they say of the targets."""
    rates = [p["copy_gb_s"] for p in processes if p["copy_gb_s"]]
    beside = set_beside_bounds(fastest(rows), max(rates, default=float("inf")) * 1e9)
    shapes = dict.fromkeys(row["shape"] for row in rows)
    return {
        "copy_gb_s": rates,
        "shapes": {name: QUANT_SHAPES[name].as_dict() for name in shapes},
        "targets": targets(beside),
        "rows": beside,
        "all_rows": rows,
    }
