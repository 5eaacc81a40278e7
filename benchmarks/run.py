"""Measure a suite against its bounds and stock vLLM, in one run on one machine.

    python benchmarks/run.py --suite engine --out benchmarks/results/engine.json

The suite ``engine``: a model of Qwen3-30B-A3B's shape with dummy weights and uniform routing, by
vLLM with its default compilation and CUDA graphs. Every configuration is a process of its own:
everything resident, vLLM's ``--cpu-offload-gb``, and the plugin with several shares in slots. The
file is written after each of them; ``--only`` measures some of them and keeps the rest.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

from shapes import SHAPES, Shape

BATCHES = (1, 8, 32, 128)
GIB = 1 << 30


def configurations(shape: Shape, name: str, *, tiny: bool) -> list[dict[str, Any]]:
    """All servers of the suite, as jobs for ``served.py``."""
    chunk = 256 if tiny else 8192
    settings: dict[str, Any] = {"kv_cache_memory_bytes": (64 << 20) if tiny else 3 * GIB}
    if tiny:
        settings |= {"dtype": "float32", "enforce_eager": True}
    else:
        settings["compilation_config"] = {"cudagraph_capture_sizes": list(BATCHES)}
    base = {
        "shape": name,
        "chunk": chunk,
        "max_model_len": 4 * chunk + 64,
        "batches": BATCHES,
        "steps": 4 if tiny else 24,
        "repeats": 1 if tiny else 3,
        "prefills": [chunk],
    }

    def job(label: str, more: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return {**base, "name": label, "settings": {**settings, **more}, **changes}

    jobs = [job("resident", {})]
    for share in (1.0, 0.5, 0.25, 0.0):
        plugin = {"plugin": "moe-offload", "moe_offload": {"cache_fraction": share}}
        prefills = [chunk] if share == 1.0 else [chunk, 4 * chunk]
        confined = shape.num_experts // 2 if share == 0.5 else None
        jobs.append(job(f"plugin {share}", plugin, prefills=prefills, confined=confined))
    for share in (0.5, 0.25):
        stock = {
            "cpu_offload_gb": (1 - share) * shape.pool_bytes / GIB,
            "cpu_offload_params": ["experts"],
        }
        jobs.append(job(f"cpu-offload {share}", stock, steps=4 if tiny else 8))
    return jobs


def measure(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one configuration; rows carry its name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "job.json").write_text(json.dumps({**job, "folder": str(path / "model")}))
        script = Path(__file__).with_name("served.py")
        command = [sys.executable, str(script), "--job", str(path / "job.json")]
        code = subprocess.run([*command, "--out", str(path / "rows.json")], check=False).returncode
        if code:
            return [{"configuration": job["name"], "exit": code}]
        rows = json.loads((path / "rows.json").read_text())
    return [{"configuration": job["name"], **row} for row in rows]


def judge(rows: list[dict[str, Any]], rate: float) -> list[dict[str, Any]]:
    """Set every row beside its bound, its target and the stock servers of the same run.

    Args:
        rows: all rows of a run.
        rate: bytes a second of the link.
    """
    resident = {_case(row): row["seconds"] for row in _of(rows, "resident")}
    judged = []
    for row in rows:
        if not row["configuration"].startswith("plugin") or "exit" in row:
            judged.append(row)
            continue
        share = float(row["configuration"].split()[1])
        t_res = _resident_time(row, resident)
        value, target, larger = _target(row, share, t_res, rate)
        passes = None if value is None else (value >= target if larger else value <= target)
        offload = {_case(r): r["seconds"] for r in _of(rows, f"cpu-offload {share}")}
        stock = offload.get(_case(row))
        judged.append(
            {
                **row,
                "resident_seconds": t_res,
                "copy_bound_seconds": row["bytes"] / rate,
                "value": value,
                "target": f"{'>=' if larger else '<='} {target}",
                "cpu_offload_seconds": stock,
                "passed": None
                if passes is None
                else passes and (stock is None or row["seconds"] < stock),
            }
        )
    return judged


def _target(
    row: dict[str, Any], share: float, t_res: float | None, rate: float
) -> tuple[float | None, float, bool]:
    """What is judged, its target, and whether larger is better."""
    if t_res is None:
        return None, 0.0, True
    seconds, bound = row["seconds"], row["bytes"] / rate
    if row.get("confined"):
        return seconds / t_res, 1.12, False
    if share == 1.0:
        return seconds / t_res, 1.10 if row["case"] == "prefill" else 1.05, False
    if row["case"] == "prefill":
        return max(t_res, bound) / seconds, 0.95, True
    if row["batch"] <= 8:
        return (t_res + bound) / seconds, 0.93, True
    return max(t_res, bound) / seconds, 0.88, True


def _resident_time(row: dict[str, Any], resident: dict[Any, float]) -> float | None:
    """Time of the same case with all experts resident; of several chunks, that many times one."""
    if row["case"] == "decode":
        return resident.get(_case(row))
    chunks = [(key[1], time) for key, time in resident.items() if key[0] == "prefill"]
    return next((time * row["tokens"] / tokens for tokens, time in chunks), None)


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["case"], row.get("tokens") or row.get("batch"))


def _of(rows: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["configuration"] == name and "exit" not in row]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("configuration", "case", "ms", "GB", "hits", "value", "target", "passed")
    for row in rows:
        if "exit" in row:
            table.add_row(row["configuration"], f"exit status {row['exit']}")
            continue
        case, value = _case(row), row.get("value")
        confined = ", residents only" if row.get("confined") else ""
        table.add_row(
            row["configuration"],
            f"{case[0]} {case[1]}{confined}",
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['bytes'] / 1e9:.2f}" if "bytes" in row else "",
            f"{row['hit_ratio']:.2f}" if "hit_ratio" in row else "",
            "" if value is None else f"{value:.3f}",
            row.get("target", ""),
            {True: "yes", False: "NO", None: ""}[row.get("passed")],
        )
    Console(width=110).print(table)


def main() -> int:
    """Measure the suite, or parts of it, and write the file."""
    from machine import provenance

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=["engine"], required=True)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b-16")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="revision, where the tree has no repository")
    parser.add_argument("--only", nargs="*", help="names of configurations")
    args = parser.parse_args()
    jobs = configurations(SHAPES[args.shape], args.shape, tiny=args.shape == "tiny")
    rows: list[dict[str, Any]] = []
    rates: list[float] = []
    if args.only and args.out.exists():
        earlier = json.loads(args.out.read_text())
        rows = [r for r in earlier["rows"] if r["configuration"] not in args.only]
        rates = earlier["copy_gb_s"]
    result: dict[str, Any] = {**provenance(args.commit), "shape": SHAPES[args.shape].as_dict()}
    for job in jobs:
        if args.only and job["name"] not in args.only:
            continue
        rates.append(_link_rate())
        rows += measure(job)
        result |= {"copy_gb_s": rates, "rows": judge(rows, max(rates) * 1e9)}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result["rows"])
    return 0 if all(row.get("passed", True) is not False for row in result["rows"]) else 1


def _link_rate() -> float:
    """GB/s of pinned copies, in a process of its own that leaves the GPU's memory free."""
    code = (
        "import sys; sys.path.append(sys.argv[1]); import torch, layers; "
        "print(layers.copy_rate() / 1e9 if torch.cuda.is_available() else 10.0)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
