"""The subcommand ``vllm-moe-offload watch``. What it needs is imported when it runs."""

import argparse
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from vllm_moe_offload.watch.sample import Sample

MIN_INTERVAL_S = 0.5
"""Workers count anew every second: more often there is nothing to see."""


def add_watch_parser(commands: Any) -> None:
    """Add the subcommand to the command line.

    Args:
        commands: what ``add_subparsers`` returned.
    """
    summary = "Watch a running server: hits by layer, bytes against PCIe, tokens a second."
    parser = commands.add_parser("watch", help=summary, description=summary)
    parser.add_argument("url", metavar="URL", help="of the server, such as localhost:8000")
    parser.add_argument(
        "--interval-s",
        type=_interval,
        default=2.0,
        metavar="SECONDS",
        help=f"between two readings, at least {MIN_INTERVAL_S}; default: 2",
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Watch until interrupted; return 2 if there is nothing to watch."""
    from rich.console import Console
    from rich.text import Text

    from vllm_moe_offload.errors import OffloadError
    from vllm_moe_offload.watch.sample import metrics_url, read

    console = Console(highlight=False)
    try:
        url = metrics_url(arguments.url)
        first = read(url)
        if arguments.once:
            time.sleep(arguments.interval_s)
            console.print(_frame(url, first, read(url)))
        else:
            _watch(url, first, arguments.interval_s, console)
    except OffloadError as error:
        Console(stderr=True, highlight=False).print(Text(str(error), style="red"), soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _watch(url: str, sample: "Sample", interval_s: float, console: "Console") -> None:
    from rich.live import Live

    from vllm_moe_offload.errors import OffloadError
    from vllm_moe_offload.watch.sample import read

    with Live(_frame(url, sample, sample), console=console, screen=console.is_terminal) as live:
        while True:
            time.sleep(interval_s)
            try:
                before, sample = sample, read(url)
            except OffloadError as error:
                live.update(_frame(url, sample, sample, problem=str(error)))
                continue
            live.update(_frame(url, before, sample))


def _frame(
    url: str, before: "Sample", after: "Sample", problem: str | None = None
) -> "RenderableType":
    from vllm_moe_offload.watch.change import Change
    from vllm_moe_offload.watch.view import frame

    age_s = max(0.0, time.time() - after.counted_at)
    return frame(url, after, Change.between(before, after), age_s=age_s, problem=problem)


def _interval(text: str) -> float:
    with suppress(ValueError):
        value = float(text)
        if math.isfinite(value) and value >= MIN_INTERVAL_S:
            return value
    raise argparse.ArgumentTypeError(f"{text} is less than {MIN_INTERVAL_S}, or no number")
