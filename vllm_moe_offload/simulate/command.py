"""``vllm-moe-offload simulate``: what a cache, a policy and a predictor gain on traces."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from vllm_moe_offload.errors import OffloadError

_CACHES = "0.125,0.25,0.5,0.75"
_POLICIES = "lru,lfu,eam,least-stale,adaptive,belady"

_Value = TypeVar("_Value")

FILE_WIDTH = 120
"""Columns where the output is no terminal."""


def add_simulate_parser(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    summary = "Replay traces against caches, eviction policies and predictors."
    parser = subparsers.add_parser(
        "simulate",
        help=summary,
        description=f"{summary} Each layer has floor(CACHE x experts) slots, empty at the start. "
        "Told for each policy: hit ratio, share of the gap from lru to belady (which knows the "
        "future, and may pass experts through without a slot), and bytes moved a token; for each "
        "predictor: coverage with as many guesses as a token has choices and with twice as many, "
        "precision, and bytes wasted. Several traces of one model: a predictor learns the others "
        "before it is tested on one.",
    )
    parser.add_argument(
        "traces", nargs="+", type=Path, metavar="TRACE", help="a .npz file, or a directory of them"
    )
    parser.add_argument(
        "--cache", default=_CACHES, help=f"shares of the experts with a slot; default {_CACHES}"
    )
    parser.add_argument(
        "--policy",
        default=_POLICIES,
        help=f"eviction policies; default {_POLICIES}; 'default' is what the engine uses",
    )
    parser.add_argument(
        "--predictor", default="none", help="none, markov, eam; default none, which is quickest"
    )
    parser.add_argument(
        "--prefetch-mb",
        type=float,
        default=0.0,
        metavar="N",
        help="MiB that may be prefetched a layer and step by the predictor's guesses; "
        "default 0: guesses are only compared with what was routed. Without belady, whose "
        "knowledge leaves nothing to guess",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="B",
        help="sequences that run at once; default 1. From 2 on the hit ratio is also told by "
        "unique loads: an expert counts once a step",
    )
    parser.add_argument(
        "--expert-mb",
        type=float,
        metavar="N",
        help="size of one expert in MiB; known for some models by the trace's model name",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a list of objects, one for each trace, predictor, policy and cache size",
    )
    parser.set_defaults(run=run_simulate)


def run_simulate(args: argparse.Namespace) -> int:
    """Answer on the standard output; returns the exit status."""
    # Late, so that other subcommands do not wait for numpy.
    from vllm_moe_offload.simulate.report import Question, answer, check
    from vllm_moe_offload.trace import load_all

    try:
        question = Question(
            caches=_listed("--cache", args.cache, float),
            policies=_listed("--policy", args.policy, str),
            predictors=_listed("--predictor", args.predictor, str),
            prefetch_mb=args.prefetch_mb,
            batch=args.batch,
            expert_mb=args.expert_mb,
        )
        traces = {
            f"{path} ({number})" if number else str(path): trace
            for path in args.traces
            for number, trace in enumerate(load_all(path))
        }
        check(question, traces)
    except OffloadError as error:
        print(error, file=sys.stderr)
        return 2
    start = time.perf_counter()
    rows = list(answer(question, traces))
    if args.json:
        print(json.dumps([row.to_json() for row in rows], indent=1))
    else:
        _print_tables(rows, time.perf_counter() - start)
    return 0


def _listed(option: str, text: str, kind: Callable[[str], _Value]) -> tuple[_Value, ...]:
    """Split at commas, each value once."""
    try:
        values = tuple(dict.fromkeys(kind(part.strip()) for part in text.split(",")))
    except ValueError:
        raise OffloadError(option, text, "it is no list", "Give values between commas") from None
    return values


def _print_tables(rows: list[Any], seconds: float) -> None:
    from rich.console import Console

    from vllm_moe_offload.simulate.report import tables

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    for table in tables(rows):
        console.print(table)
    console.print(f"{seconds:.1f} s")
