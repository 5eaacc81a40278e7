"""Measure suites against their bounds and stock vLLM, in one run on one machine.

    python benchmarks/run.py --suite engine --out benchmarks/results/engine.json
    python benchmarks/run.py --render benchmarks/results/engine.json

``engine``: a model of Qwen3-30B-A3B's shape with dummy weights and uniform routing, by vLLM with
its default compilation and CUDA graphs, against the table of targets. ``growth``: how time grows
with the batch, the prompt and the share of experts without a slot. ``shapes``: other models. Every
configuration is a process of its own: everything resident, vLLM's ``--cpu-offload-gb``, and the
plugin with several shares in slots. Several suites at once share their processes. The file is
written after each process; ``--only`` measures some of them and keeps the rest.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import report
from jobs import run_all
from requirements import set_beside_bounds, verdicts
from shapes import SHAPES
from suites import SUITES, chunk_of, united


def main() -> int:
    """Measure suites, or parts of them, and write the file; or print one."""
    args = parse(sys.argv[1:])
    if args.render:
        print(report.markdown(json.loads(args.render.read_text())))
        return 0
    jobs = united([job for name in args.suite for job in SUITES[name](args.shape, args.option)])
    if args.list:
        print(*(job["name"] for job in jobs), sep="\n")
        return 0
    result = measure(args, [job for job in jobs if not args.only or job["name"] in args.only])
    report.show(result)
    failed = [v for v in result["targets"] if v["passed"] is False]
    return 1 if failed or report.failures(result["processes"]) else 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=["engine"])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b-16")
    parser.add_argument("--out", type=Path, help="file of the results")
    parser.add_argument("--commit", help="revision, where the tree has no repository")
    parser.add_argument("--only", nargs="*", help="names of configurations")
    parser.add_argument("--list", action="store_true", help="print the configurations' names")
    parser.add_argument("--render", type=Path, metavar="FILE", help="print results as Markdown")
    parser.add_argument(
        "--option",
        type=_option,
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="options of the plugin in every configuration",
    )
    args = parser.parse_args(arguments)
    args.option = dict(args.option)
    if not (args.out or args.render or args.list):
        parser.error("--out is needed to measure")
    return args


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def measure(args: argparse.Namespace, jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Run jobs; the file holds what there is after each."""
    from machine import provenance

    names = {job["name"] for job in jobs}
    processes, rows = _earlier(args.out, names) if args.only else ([], [])
    origin = {**provenance(args.commit), "shape": SHAPES[args.shape].as_dict()}
    result: dict[str, Any] = {}
    start = time.monotonic()
    for done in run_all(jobs):
        rows += done.pop("rows")
        processes.append(done)
        _tell(done, time.monotonic() - start)
        rates = [p["copy_gb_s"] for p in processes if p["copy_gb_s"]]
        judged = set_beside_bounds(rows, max(rates, default=float("inf")) * 1e9)
        result = {
            **origin,
            "copy_gb_s": rates,
            "targets": verdicts(judged, chunk_of(args.shape)),
            "rows": judged,
            "processes": processes,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _earlier(out: Path, names: set[str]) -> tuple[list[Any], list[Any]]:
    """Processes and rows of an earlier run that are not measured again."""
    if not out.exists():
        return [], []
    earlier = json.loads(out.read_text())
    processes, rows = (
        [entry for entry in earlier[part] if entry["configuration"] not in names]
        for part in ("processes", "rows")
    )
    return processes, rows


def _tell(done: dict[str, Any], elapsed: float) -> None:
    outcome = "done" if done["exit"] == 0 else f"FAILED ({done['exit']})\n{done['log']}"
    print(f"[{elapsed:4.0f} s] {done['configuration']}: {done['seconds']} s, {outcome}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
