"""The subcommand ``vllm-moe-offload plan``. What it needs is imported when it runs."""

import argparse
import json
import math
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_moe_offload.plan.model import Model
    from vllm_moe_offload.plan.planner import Request

PCIE_GB_PER_S = {"gen3": 12.0, "gen4": 25.0, "gen5": 52.0}
"""What 16 lanes of each generation deliver from pinned memory, in 10^9 bytes a second."""

DEFAULT_LENGTH = 8192
"""Tokens of a sequence if the user names no number."""

_DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")
_PREDICTORS = ("none", "gate", "markov", "eam")


def add_plan_parser(commands: Any) -> None:
    """Add the subcommand to the command line.

    Args:
        commands: what ``add_subparsers`` returned.
    """
    summary = "Tell from a checkpoint's headers what fits on a machine, and how to serve it."
    status = "The exit status is 0 whether or not it fits; --json has fits."
    parser = commands.add_parser("plan", help=summary, description=f"{summary} {status}")
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint folder, or a name in Hugging Face's local cache"
    )
    _add_machine(parser)
    parser.add_argument(
        "--max-model-len",
        type=_count,
        help=f"tokens of the longest sequence; default: {DEFAULT_LENGTH} or what the model allows",
    )
    parser.add_argument(
        "--concurrency", type=_count, default=4, help="sequences at once; default: 4"
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="as of vllm serve; default: auto"
    )
    parser.add_argument(
        "--predictor",
        choices=_PREDICTORS,
        default="none",
        help="as of the plugin: its tables take GPU memory; default: none",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    parser.set_defaults(run=run)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu-gb", type=_positive, default=24, help="memory of the GPU in GiB; default: 24"
    )
    parser.add_argument(
        "--host-gb", type=_positive, default=64, help="memory of the host in GiB; default: 64"
    )
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument(
        "--pcie", choices=sorted(PCIE_GB_PER_S), default="gen4", help="16 lanes; default: gen4"
    )
    rate.add_argument(
        "--pcie-gb-s", type=_positive, help="measured rate to the GPU in 10^9 bytes a second"
    )
    rate.add_argument(
        "--doctor", metavar="FILE", help="take the rate from what doctor --json has printed"
    )


def run(arguments: argparse.Namespace) -> int:
    """Plan, print, and return the exit status: 0 for any plan, 2 if there is nothing to plan."""
    from rich.console import Console
    from rich.text import Text

    from vllm_moe_offload.errors import OffloadError
    from vllm_moe_offload.plan.changes import smallest_changes
    from vllm_moe_offload.plan.checkpoint import read_checkpoint
    from vllm_moe_offload.plan.model import describe
    from vllm_moe_offload.plan.planner import make_plan
    from vllm_moe_offload.plan.report import as_dict, show

    try:
        model = describe(read_checkpoint(arguments.model))
        request = _request(arguments, model)
    except (OffloadError, OSError) as error:
        Console(stderr=True, highlight=False).print(Text(str(error), style="red"), soft_wrap=True)
        return 2
    plan = make_plan(model, request)
    changes = smallest_changes(plan)
    if arguments.json:
        print(json.dumps(as_dict(plan, changes), indent=2), file=sys.stdout)
    else:
        show(plan, changes, Console(highlight=False))
    return 0


def _request(arguments: argparse.Namespace, model: "Model") -> "Request":
    from vllm_moe_offload.plan.planner import Request
    from vllm_moe_offload.sizes import GIB

    _check_length(arguments, model)
    given = arguments.pcie_gb_s or PCIE_GB_PER_S[arguments.pcie]
    longest = min(DEFAULT_LENGTH, model.max_positions or DEFAULT_LENGTH)
    return Request(
        model=arguments.model,
        gpu_bytes=int(arguments.gpu_gb * GIB),
        host_bytes=int(arguments.host_gb * GIB),
        max_model_len=arguments.max_model_len or longest,
        concurrency=arguments.concurrency,
        dtype=arguments.dtype,
        pcie_bytes_per_s=_measured(arguments.doctor) if arguments.doctor else given * 1e9,
        predictor=arguments.predictor,
    )


def _check_length(arguments: argparse.Namespace, model: "Model") -> None:
    from vllm_moe_offload.errors import OffloadError

    if model.length_limit and (arguments.max_model_len or 0) > model.length_limit:
        raise OffloadError(
            "--max-model-len",
            arguments.max_model_len,
            f"the model has {model.length_limit} positions, and vLLM refuses more",
            f"Give at most {model.length_limit}",
        )


def _measured(file: str) -> float:
    """Rate of a copy to the slowest GPU that the doctor has measured, in bytes a second."""
    from vllm_moe_offload.errors import OffloadError

    try:
        text = Path(file).read_text()
    except OSError as error:
        problem = error.strerror or str(error)
        raise OffloadError("--doctor", file, problem, "Give a file that can be read") from None
    try:
        gpus = json.loads(text)["gpus"]
        return float(min(gpu["copy_to_gpu_bytes_per_s"] for gpu in gpus))
    except (ValueError, TypeError, KeyError) as error:
        raise OffloadError(
            "--doctor",
            file,
            "it holds no measured rate",
            "Write it on a machine with a GPU: vllm-moe-offload doctor --json > FILE",
        ) from error


def _positive(text: str) -> float:
    with suppress(ValueError):
        value = float(text)
        if value > 0 and math.isfinite(value):
            return value
    raise argparse.ArgumentTypeError(f"{text} is no positive number")


def _count(text: str) -> int:
    with suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"{text} is no positive whole number")
