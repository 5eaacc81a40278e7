"""The command ``vllm-moe-offload``."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from vllm_moe_offload import __version__
from vllm_moe_offload.doctor.command import add_doctor_parser
from vllm_moe_offload.plan.command import add_plan_parser
from vllm_moe_offload.simulate.command import add_simulate_parser
from vllm_moe_offload.trace_command import add_trace_parser
from vllm_moe_offload.watch.command import add_watch_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    arguments = make_parser().parse_args(argv)
    try:
        status = int(arguments.run(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read it has enough, as ``head`` has. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def make_parser() -> argparse.ArgumentParser:
    """Describe all subcommands; each sets ``run`` to what runs it."""
    parser = argparse.ArgumentParser(
        prog="vllm-moe-offload", description="Tools around expert offloading for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    add_doctor_parser(commands)
    add_plan_parser(commands)
    add_simulate_parser(commands)
    add_trace_parser(commands)
    add_watch_parser(commands)
    return parser


def _add_demo(commands: Any) -> None:
    summary = "Serve a model with a quarter of its experts on the device, and with stock vLLM."
    parser = commands.add_parser("demo", help=summary, description=f"{summary} Compare the tokens.")
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint folder or name on the hub; default: a small random one, made here",
    )
    parser.add_argument("--dtype", help="data type of weights and computation, as of vllm serve")
    parser.add_argument(
        "--format",
        choices=("fp8", "w4a16", "mxfp4"),
        help="store the experts of the small random checkpoint in this format",
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    # Each subcommand is imported when it is used, so that the others stay quick.
    from vllm_moe_offload import demo

    return demo.run(arguments.model, arguments.dtype, arguments.format)


if __name__ == "__main__":
    sys.exit(main())
