"""``vllm-moe-offload trace``: what a trace holds."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vllm_moe_offload.errors import OffloadError


def add_trace_parser(subparsers: Any) -> None:
    """Add the subcommand to the command line."""
    summary = "Tell what a trace of activated experts holds."
    parser = subparsers.add_parser("trace", help=summary, description=summary)
    actions = parser.add_subparsers(dest="action", required=True)
    summary = "Show contents, hot experts, entropy of each layer and reuse distances."
    show = actions.add_parser("show", help=summary, description=summary)
    show.add_argument("file", type=Path, metavar="FILE", help="a .npz file, or a directory of them")
    show.add_argument(
        "--plot",
        type=Path,
        metavar="OUT.png",
        help="draw the experts' shares by layer, and hits against cache size (needs matplotlib)",
    )
    parser.set_defaults(run=run_trace)


def run_trace(args: argparse.Namespace) -> int:
    """Show a trace on the standard output; returns the exit status."""
    # Late, so that other subcommands do not wait for numpy.
    from vllm_moe_offload import trace_report
    from vllm_moe_offload.trace import load_all

    try:
        traces = load_all(args.file)
        if args.plot and len(traces) > 1:
            raise OffloadError(
                "--plot", args.plot, f"{args.file} holds {len(traces)} recordings", "Give one file"
            )
        for trace in traces:
            trace_report.show(trace, args.file)
        if args.plot:
            trace_report.plot(traces[0], args.plot)
    except OffloadError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
