"""The subcommand ``vllm-moe-offload doctor``. What it needs is imported when it runs."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_moe_offload.doctor.facts import Facts

GPU_BUDGET_S = 15.0
"""Begin to measure no further GPU after so many seconds: the whole takes half a minute at most."""


def add_doctor_parser(commands: Any) -> None:
    """Add the subcommand to the command line.

    Args:
        commands: what ``add_subparsers`` returned.
    """
    summary = "Tell what is wrong or slow on this machine for offloaded experts, and the remedy."
    parser = commands.add_parser("doctor", help=summary, description=summary)
    parser.add_argument(
        "--json", action="store_true", help="print JSON; plan --doctor FILE reads the rates in it"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Examine, print, and return the exit status: 1 if something is broken."""
    from rich.console import Console

    from vllm_moe_offload.doctor.checks import is_healthy, judge
    from vllm_moe_offload.doctor.report import as_dict, show

    facts = _examine()
    findings = judge(facts)
    if arguments.json:
        print(json.dumps(as_dict(facts, findings), indent=2))
    else:
        show(findings, Console(highlight=False))
    return 0 if is_healthy(findings) else 1


def _examine() -> "Facts":
    from vllm_moe_offload.doctor import probe, rates
    from vllm_moe_offload.doctor.facts import Facts
    from vllm_moe_offload.memory import available_host_memory

    available = available_host_memory().available
    gpus, problem = probe.read_gpus()
    software = probe.read_software()
    measured = {}
    if gpus and software.versions["torch"] is not None:
        measured = rates.measure_gpus(available, budget_s=GPU_BUDGET_S)
    host = probe.read_host(rates.measure_host(available))
    return Facts(host, software, gpus, measured, problem)
