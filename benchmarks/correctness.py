"""Are the answers right on this machine? Tiny models, every residency, against stock vLLM.

    python benchmarks/correctness.py --jobs 16 --out benchmarks/results/correctness.json

For each model and type: the tokens and log-probabilities must be the same to the last bit for
slots of 0, 10, 25, 50 and 100 % of the experts, at batches of 1, 7 and 32 and after a long prompt
in chunks, and in float32 the tokens must be those of vLLM without the plugin. On a GPU the pool
must be pinned, and readable by the GPU under its own address.

Compiled cases run beside controls, which tell the plugin's doing from the compiler's: code that is
compiled twice may be tuned apart and then round differently. ``vLLM, compiled apart`` compares two
builds of stock vLLM, ``vLLM, same build`` two starts from one build, and so on. They are reported,
and no promise.

A row names the first answer that differs: the phase, the request in it, the step and the change of
the log-probability; and whether both runs put the same requests into the same steps.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

from answers import difference, generate, plugin, tokens_of, until_tokens_part


class Case(NamedTuple):
    """One comparison; ``mode`` is a key of ``MODES``."""

    family: str
    mode: str
    dtype: str
    runner: str


HAS_GPU = shutil.which("nvidia-smi") is not None
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
REPEATED_SHARE = 0.25
GRAPH_SIZES = [1, 2, 4, 8, 16, 32]

MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "piecewise": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "full": {"compilation_config": {"cudagraph_mode": "FULL"}},
    "graphs": {"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}},
}
"""Settings of vLLM by mode; ``graphs`` is vLLM's default, full graphs for decode alone."""


def run_shares(path: Path, case: Case) -> dict[str, Any]:
    """Run every residency and stock vLLM; a compiled case starts some of them again.

    The start that compiles is not among the residencies: it tunes while it runs, and later starts
    load what it found.
    """
    starts = {f"share {share}": plugin(share) for share in SHARES} | {"stock": {}}
    if case.mode != "eager":
        again = {"share again": plugin(REPEATED_SHARE), "stock again": {}}
        starts = {"first start": plugin(REPEATED_SHARE), **starts, **again}
    return _run_all(path, case, starts)


def run_control(path: Path, case: Case) -> dict[str, Any]:
    """Run builds that share nothing with those of the case."""
    starts = {"stock": {}, "stock again": {}, "share": plugin(REPEATED_SHARE)}
    return _run_all(path, case, starts)


def _run_all(path: Path, case: Case, starts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    settings = {"dtype": case.dtype, **_mode_settings(case.mode)}
    runs = {}
    for name, options in starts.items():
        print(f"start: {name}", flush=True)  # the last one in a log is the one that failed
        runs[name] = generate(path, **settings, **options)
    return runs


def _mode_settings(mode: str) -> dict[str, Any]:
    settings = dict(MODES[mode])
    if "compilation_config" in settings:
        settings["compilation_config"] = {
            **settings["compilation_config"],
            "cudagraph_capture_sizes": GRAPH_SIZES,
        }
    return settings


def judge(case: Case, runs: dict[str, Any], control: dict[str, Any] | None) -> dict[str, Any]:
    """Compare the runs of a case."""
    first = runs[f"share {SHARES[0]}"]
    to_first = {
        name: difference(first, run) for name, run in runs.items() if name.startswith("share ")
    }
    stock = runs["stock"]
    row: dict[str, Any] = {
        "bit_identical": not any(to_first.values()),
        "same_schedule": all(run["schedule"] == first["schedule"] for run in runs.values()),
        "differences": {name: found for name, found in to_first.items() if found},
        "tokens_equal_stock": tokens_of(stock) == tokens_of(first),
        "max_logprob_difference_to_stock": until_tokens_part(stock, first),
        "engine": {name: run["facts"] for name, run in runs.items()},
    }
    if control is not None:
        repeated = runs[f"share {REPEATED_SHARE}"]
        row["controls"] = {
            "vLLM, same build": difference(stock, runs["stock again"]),
            "vLLM, compiled apart": difference(stock, control["stock"]),
            "vLLM, no compile cache, twice": difference(control["stock"], control["stock again"]),
            "plugin, same build": difference(repeated, runs["share again"]),
            "plugin, start that compiled": difference(repeated, runs["first start"]),
            "plugin, compiled apart": difference(repeated, control["share"]),
        }
    facts = row["engine"].values()
    row["passed"] = (
        row["bit_identical"]
        and (row["tokens_equal_stock"] or case.dtype != "float32")
        and all(fact.get("pool_pinned", True) and fact.get("pool_mapped", True) for fact in facts)
    )
    return row


def run_one(case: Case, part: str) -> dict[str, Any]:
    """Make a checkpoint and run one part of a case."""
    from vllm_moe_offload.checkpoints import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder), case.family, hidden_size=256, num_experts=16, top_k=4)
        return run_control(path, case) if part == "control" else run_shares(path, case)


def cases(
    families: Sequence[str] = (), modes: Sequence[str] = (), dtypes: Sequence[str] = ()
) -> list[Case]:
    """Everything that this machine compares, the slowest first; a CPU has one runner, eager."""
    from vllm_moe_offload.checkpoints import MOE_FAMILIES

    compiled = [
        Case(family, mode, "bfloat16", "V2")
        for mode in ("graphs", "full", "piecewise")
        for family in ("qwen3_moe", "deepseek_v2")
    ]
    eager = [
        Case(family, "eager", dtype, "V2")
        for family in sorted(MOE_FAMILIES, key=lambda family: family != "deepseek_v2")
        for dtype in ("bfloat16", "float32")
    ]
    older = [Case(family, "eager", "float32", "V1") for family in ("gpt_oss", "qwen3_moe")]
    planned = compiled + eager + older if HAS_GPU else [c._replace(runner="V1") for c in eager]
    return [
        case
        for case in planned
        if case.family in (families or MOE_FAMILIES)
        and case.mode in (modes or MODES)
        and case.dtype in (dtypes or ("bfloat16", "float32"))
    ]


def main() -> int:
    """Run every case in processes of its own; the result file grows with each."""
    args = parse(sys.argv[1:])
    if args.one:
        args.out.write_text(json.dumps(run_one(Case(*args.one[0].split(",")), args.one[1])))
        return 0

    from machine import provenance

    origin, rows = provenance(args.commit), []
    planned = cases(args.families, args.modes, args.dtypes)
    with ThreadPoolExecutor(args.jobs) as pool:
        started = [
            (
                case,
                pool.submit(_in_a_process, case, "shares"),
                None if case.mode == "eager" else pool.submit(_in_a_process, case, "control"),
            )
            for case in planned
        ]
        for case, shares, control in started:
            rows.append(_row(case, shares, control))
            all_passed = len(rows) == len(planned) and all(row["passed"] for row in rows)
            result = {**origin, "passed": all_passed, "rows": rows}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if rows and all_passed else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="revision, where the tree has no repository")
    parser.add_argument("--families", nargs="*", default=[], help="only these; default all")
    parser.add_argument("--modes", nargs="*", choices=MODES, default=[], help="likewise")
    parser.add_argument("--dtypes", nargs="*", choices=("bfloat16", "float32"), default=[])
    parser.add_argument("--jobs", type=int, default=1, help="processes that run at once")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "PART"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


Outcome = tuple[int, dict[str, Any], str]
"""Exit code of a process, its runs, and the end of its log if it failed."""


def _row(case: Case, shares: Future[Outcome], control: Future[Outcome] | None) -> dict[str, Any]:
    code, runs, log = shares.result()
    row: dict[str, Any] = {**case._asdict(), "exit": code, "passed": False}
    control_code, controls, control_log = control.result() if control else (0, None, "")
    if control_code:
        row["control_exit"], row["control_log"] = control_code, control_log
    row |= judge(case, runs, controls or None) if code == 0 else {"log": log}
    print(json.dumps({name: v for name, v in row.items() if name != "engine"}), flush=True)
    return row


LOG_TAIL = 1500


def what_failed(log: str) -> str:
    """The starts, the first errors and the end of a log."""
    lines = log.splitlines()
    errors = [line for line in lines if "rror" in line and "previous" not in line][:12]
    starts = [line for line in lines if line.startswith("start: ")]
    return "\n".join([*starts, *errors, "...", log[-LOG_TAIL:]])


def _in_a_process(case: Case, part: str) -> Outcome:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(case.runner == "V2")),
        # Triton multiplies float32 as TF32 unless told, which moves stock vLLM's tokens.
        "TRITON_F32_DEFAULT": "ieee",
    }
    if case.dtype == "float32":
        environment["VLLM_MLA_DISABLE"] = "1"  # no latent attention for this type on CUDA
    if part == "control":
        environment["VLLM_DISABLE_COMPILE_CACHE"] = "1"
    if not HAS_GPU:
        environment["TORCHDYNAMO_DISABLE"] = "1"  # sampling would be compiled for a minute
    with tempfile.TemporaryDirectory() as folder:
        if case.mode != "eager":
            # Nothing compiled by another process, nor before; each builds in its own folder.
            environment["VLLM_CACHE_ROOT"] = f"{folder}/vllm"
        out, log = Path(folder, "runs.json"), Path(folder, "log")
        command = [sys.executable, __file__, "--one", ",".join(case), part, "--out", str(out)]
        with log.open("w") as file:
            code = subprocess.run(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        text = log.read_text(errors="replace")
        print(f"{','.join(case)} {part}: exit status {code}", flush=True)
        return code, json.loads(out.read_text()) if code == 0 else {}, what_failed(text)


if __name__ == "__main__":
    sys.exit(main())
