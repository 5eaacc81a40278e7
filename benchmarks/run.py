"""Measure suites against their bounds and stock vLLM, in one run on one machine.

    python benchmarks/run.py --suite engine --out benchmarks/results/engine.json
    python benchmarks/run.py --render benchmarks/results/engine.json
    python benchmarks/run.py --plot benchmarks/results/growth.json

``engine``: a model of Qwen3-30B-A3B's shape with dummy weights and uniform routing, by vLLM with
its default compilation and CUDA graphs, against the table of targets. ``growth``: how time grows
with the batch, the prompt and the share of experts without a slot. ``shapes``: other models.
``trace``: a recorded trace replayed by the engine and by the simulator, hit for hit.
``prediction``: policies and predictors on replayed routing, against stock vLLM. ``quant``:
quantised experts beside stock vLLM's backends; ``--only`` names shapes too. ``budget``: experts
and KV cache in one budget, against splits that are made once. Every
configuration is a process of its own, alone at work while it is measured: everything resident,
vLLM's ``--cpu-offload-gb``, and the plugin with several shares in slots. Several suites at once
share their processes. The file is written after each process; ``--only`` measures some of them
and keeps the rest.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import plots
import prediction
import report
from jobs import Memory, run_all
from requirements import same_hits, set_beside_bounds, verdicts
from shapes import SHAPES
from suites import SUITES, TRACE_SHARES, chunk_of, profiled, trace, united

OF_TRACES = ("trace", "prediction")
"""Suites that replay a trace."""

DEFAULT_SHAPES = {"trace": "deepseek-v2-lite"}


def main() -> int:
    """Measure suites, or parts of them, and write the file; or print one."""
    args = parse(sys.argv[1:])
    if args.render:
        print(report.markdown(_results(args.render)))
        return 0
    if args.plot:
        print(*plots.draw(json.loads(args.plot.read_text()), args.plot.parent), sep="\n")
        return 0
    if args.suite[0] in ALONE:
        return ALONE[args.suite[0]](args)
    jobs = united([job for name in args.suite for job in planned(name, args)])
    if args.list:
        print(*(job["name"] for job in jobs), sep="\n")
        return 0
    if args.profile:
        name, case, size = args.profile
        (asked,) = [job for job in jobs if job["name"] == name]
        text = args.out.with_suffix(".profile.txt").resolve()
        (done,) = run_all([profiled(asked, case, int(size), str(text))])
        print(text.read_text() if done["exit"] == 0 else done["log"])
        return int(done["exit"] != 0)
    check_names(args.only, [job["name"] for job in jobs])
    result = measure(args, [job for job in jobs if not args.only or job["name"] in args.only])
    report.show(result)
    failed = [v for v in result["targets"] if v["passed"] is False]
    return 1 if failed or report.failures(result["processes"]) else 0


def quantised(args: argparse.Namespace) -> int:
    """Measure the suite of quantised experts, which has shapes and judges of its own."""
    import quant
    import torch
    from machine import provenance

    gpus = max(1, torch.cuda.device_count())
    names = quant.names(tiny=args.shape == "tiny")
    asked = [job for number, name in enumerate(names)
             for job in quant.quant(name, args.option, number % gpus)]  # fmt: skip
    if args.list:
        print(*quant.configurations(asked), sep="\n")
        return 0
    check_names(args.only, [*quant.configurations(asked), *(job["name"] for job in asked), *names])
    result = quant.measure(
        args.out, quant.only(asked, args.only), provenance(args.commit),
        together=args.together, fresh=not args.only,
    )  # fmt: skip
    report.show(result)
    failed = [v for v in result["targets"] if v["passed"] is False]
    return 1 if failed or report.failures(result["processes"]) else 0


def shared_budget(args: argparse.Namespace) -> int:
    """Measure the suite of the shared budget, which has shapes and judges of its own."""
    import budget
    from machine import provenance

    real, tiny = budget.BUDGET_SHAPES
    shape = tiny if args.shape == "tiny" else real
    names = [job["name"] for job in budget.budget(shape, args.option)]
    if args.list:
        print(*names, sep="\n")
        return 0
    check_names(args.only, names)
    result = budget.measure(
        args.out, shape, args.option, provenance(args.commit),
        only=args.only, together=args.together,
    )  # fmt: skip
    report.show(result)
    failed = [v for v in result["targets"] if v["passed"] is False]
    return 1 if failed or report.failures(result["processes"]) else 0


def predicted(args: argparse.Namespace) -> int:
    """Measure the suite of policies and predictors, which has engines and judges of its own."""
    from machine import provenance

    from vllm_moe_offload.trace import load

    shape = args.shape or prediction.shape_of(args.trace)
    learned = args.learned and str(args.learned.resolve())
    path, tokens = str(args.trace.resolve()), load(args.trace).num_tokens
    asked = prediction.prediction(shape, args.option, path, learned, tokens=tokens)
    if args.list:
        print(*prediction.names(asked), sep="\n")
        return 0
    check_names(args.only, prediction.names(asked))
    result = prediction.measure(
        args.out, prediction.only(asked, args.only), provenance(args.commit),
        together=args.together, minutes=args.minutes, fresh=not args.only,
    )  # fmt: skip
    report.show(result)
    failed = [v for v in result["targets"] if v["passed"] is False]
    return 1 if failed or report.failures(result["processes"]) else 0


ALONE = {"quant": quantised, "budget": shared_budget, "prediction": predicted}
"""Suites that run alone."""


def check_names(wanted: list[str] | None, names: list[str]) -> None:
    """End where a name is of nothing that the suite measures."""
    if unknown := [name for name in wanted or () if name not in names]:
        sys.exit(f"--only: no {', '.join(unknown)} here; --list names all configurations")


def planned(suite: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Jobs of a suite, on the shape that was asked for or on the suite's own."""
    shape = args.shape or DEFAULT_SHAPES.get(suite, "qwen3-30b-a3b-16")
    if suite == "trace":
        return trace(shape, args.option, str(args.trace.resolve()), args.trace_tokens)
    return SUITES[suite](shape, args.option)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--suite", nargs="+", choices=[*SUITES, "trace", *ALONE], default=["engine"]
    )
    parser.add_argument("--shape", choices=SHAPES, help="another model than the suite's own")
    parser.add_argument("--out", type=Path, help="file of the results")
    parser.add_argument("--commit", help="revision, where the tree has no repository")
    parser.add_argument("--only", nargs="*", help="names of configurations")
    parser.add_argument("--list", action="store_true", help="print the configurations' names")
    parser.add_argument("--render", type=Path, metavar="FILE", help="print results as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw growth beside the file")
    parser.add_argument(
        "--profile",
        nargs=3,
        metavar=("CONFIGURATION", "CASE", "SIZE"),
        help="only write where the time of one case goes, such as 'plugin 0.5' decode 8",
    )
    parser.add_argument(
        "--option",
        type=_option,
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="options of the plugin in every configuration",
    )
    parser.add_argument(
        "--together", type=int, default=2, help="servers that start at once; one is measured"
    )
    parser.add_argument(
        "--minutes", type=float, help="the suite prediction begins no engine later than that"
    )
    parser.add_argument("--trace", type=Path, help="file that a suite of traces replays")
    parser.add_argument("--learned", type=Path, help="another trace, which predictors know")
    parser.add_argument("--trace-tokens", type=int, default=512, help="how much of it")
    args = parser.parse_args(arguments)
    args.option = dict(args.option)
    alone = [suite for suite in args.suite if suite in ALONE]
    if alone and len(args.suite) > 1:
        parser.error(f"the suite {alone[0]} runs alone")
    if alone and args.profile:
        parser.error(f"--profile is not for the suite {alone[0]}")
    needing = [suite for suite in args.suite if suite in OF_TRACES]
    if needing and not (args.trace or args.render or args.plot):
        parser.error(f"the suite {needing[0]} needs --trace")
    if not (args.out or args.render or args.plot or args.list):
        parser.error("--out is needed to measure")
    return args


def _results(file: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads(file.read_text())
    if not results.keys() >= {"machine", "rows", "targets"}:
        sys.exit(f"{file}: it holds no results of this program's suites")
    return results


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
    origin = provenance(args.commit)
    shapes = {job["shape"]: SHAPES[job["shape"]].as_dict() for job in jobs}
    result: dict[str, Any] = {}
    start = time.monotonic()
    for done in run_all(jobs, Memory.of_this_machine(args.together)):
        rows += done.pop("rows")
        processes.append(done)
        _tell(done, time.monotonic() - start)
        rates = [p["copy_gb_s"] for p in processes if p["copy_gb_s"]]
        judged = set_beside_bounds(rows, max(rates, default=float("inf")) * 1e9)
        result = {
            **origin,
            "copy_gb_s": rates,
            "shapes": shapes,
            "targets": _targets(args, judged),
            "rows": judged,
            "processes": processes,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _targets(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the suites that were asked for promise."""
    found = []
    if "engine" in args.suite:
        shape = args.shape or "qwen3-30b-a3b-16"
        found += verdicts([row for row in rows if row["shape"] == shape], chunk_of(shape))
    if "trace" in args.suite:
        found.append(same_hits(rows, simulated_hits(args.trace, args.trace_tokens)))
    return found


@functools.cache
def simulated_hits(path: Path, tokens: int) -> dict[float, int]:
    """Hits of the simulator on the first tokens of a trace, by share in slots."""
    from vllm_moe_offload.simulate.replay import replay
    from vllm_moe_offload.trace import load

    whole = load(path)
    beginning = dataclasses.replace(
        whole,
        expert_ids=whole.expert_ids[:tokens],
        sequence_starts=np.minimum(whole.sequence_starts, min(tokens, whole.num_tokens)),
        is_decode=None,
    )
    found = replay(beginning, "default", TRACE_SHARES)
    return {share: int(hits) for share, hits in zip(TRACE_SHARES, found.hits_C, strict=True)}


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
