"""Serve a model with and without offloading and compare the answers: ``vllm-moe-offload demo``.

Two servers run one after the other, each in processes of its own, since a process has either the
plugin's hooks or stock vLLM; one at a time, because two share the machine's cores and memory
and together start no sooner. vLLM is not imported here.
"""

import shlex
import signal
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.text import Text

from vllm_moe_offload.checkpoints import make_checkpoint
from vllm_moe_offload.demo.agreement import ROUNDING, apart
from vllm_moe_offload.demo.conversation import REQUESTS, DemoError, Outcome, Request
from vllm_moe_offload.demo.report import Progress, figures_table, texts_table
from vllm_moe_offload.demo.server import Server, command, environment

FOLDER = Path(".demo")


_FORMATS = {"fp8": "qwen3_moe", "w4a16": "qwen3_moe", "mxfp4": "gpt_oss"}
FORMATS = tuple(_FORMATS)
"""Formats of experts that the small checkpoint can have."""


def run(model: str | None, dtype: str | None = None, form: str | None = None) -> int:
    """Run the demo and return its exit status: 0 if the servers say the same.

    Token ids are to be identical; with a format, which stock vLLM multiplies in 16 bits alone,
    they may part where rounding decides.

    Args:
        model: a checkpoint's folder or name on the hub; None makes a small random one.
        dtype: vLLM's option; None takes the checkpoint's on a GPU, and otherwise float32, in
            which two implementations of one model do not differ in their greedy choice.
        form: format of the small checkpoint's experts, one of ``FORMATS``; None leaves them as
            they are.
    """
    console = Console(highlight=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)  # the servers end with us
    try:
        return _compare(console, model, dtype, form)
    except (DemoError, PackageNotFoundError, OSError) as error:
        console.print(Text(str(error), style="red"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("Interrupted; no server is left running.")
        return 130


def _compare(console: Console, model: str | None, dtype: str | None, form: str | None) -> int:
    on_cpu = "cpu" in version("vllm")
    if form and (lack := _lacks(form, on_cpu)):
        console.print(lack)
        return 1
    if model and model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise DemoError(f"{model}: there is no such folder. Give that of a checkpoint, or its name")
    dtype = dtype or ("float32" if form is None and (on_cpu or model is None) else "auto")
    FOLDER.mkdir(exist_ok=True)
    model = model or str(_small_checkpoint(console, form))
    requests = [replace(request, with_logprobs=bool(form)) for request in REQUESTS]
    offloaded = _serve(console, model, dtype, on_cpu, requests, plugin=True)
    stock = _serve(console, model, dtype, on_cpu, requests, plugin=False)
    identical = [a.token_ids for a in offloaded.answers] == [a.token_ids for a in stock.answers]
    console.print(texts_table(offloaded, stock), figures_table(offloaded, stock), sep="\n")
    if form:
        return _say_how_far_apart(console, identical, apart(offloaded.answers, stock.answers))
    if not identical and dtype != "float32":
        console.print(
            "In 16 bit, two correct implementations may choose differently where two tokens are "
            "nearly equal; --dtype float32 compares without that."
        )
    console.print(f"identical: {'yes' if identical else 'no'}")
    return 0 if identical else 1


def _say_how_far_apart(console: Console, identical: bool, distance: float) -> int:
    agree = distance <= ROUNDING
    console.print(
        f"Up to the first token that differs, log-probabilities are within {distance:.3f} of each "
        f"other. Both servers round to 16 bits in places of their own, which explains {ROUNDING}.",
        f"identical: {'yes' if identical else 'no'}",
        f"the same but for rounding: {'yes' if agree else 'no'}",
        sep="\n",
    )
    return 0 if agree else 1


def _serve(
    console: Console,
    model: str,
    dtype: str,
    on_cpu: bool,
    requests: Sequence[Request],
    plugin: bool,
) -> Outcome:
    line = command(model, dtype, plugin)
    log = FOLDER / ("moe-offload.log" if plugin else "stock.log")
    console.print(Text(f"$ vllm {shlex.join(line[line.index('serve') :])}"), soft_wrap=True)
    with Server(line, environment(model, on_cpu, plugin), log) as server:
        with Progress(console) as progress:
            seconds = server.wait_until_healthy(progress)
        console.print(f"  ready after {seconds:.0f} s, log in {log}")
        console.print(f"  sending {len(requests)} requests at once")
        outcome = server.ask(requests, with_stats=plugin)
    tokens = sum(len(a.token_ids) for a in outcome.answers)
    console.print(f"  {tokens} tokens in {outcome.seconds:.1f} s")
    return outcome


def _lacks(form: str, on_cpu: bool) -> str | None:
    """Why stock vLLM cannot serve a format on this machine, as far as that can be told."""
    if not on_cpu or "amx_tile" in Path("/proc/cpuinfo").read_text():
        return None
    return (
        f"Not here: stock vLLM has nothing to compare with. It multiplies {form} experts on a GPU, "
        "or on a CPU with AMX, which this one lacks."
    )


def _small_checkpoint(console: Console, form: str | None) -> Path:
    family = _FORMATS[form] if form else "qwen3_moe"
    path = FOLDER / "-".join([family.replace("_", "-"), *([form] if form else [])])
    if path.exists():
        return path
    console.print(f"Making a small random {family} checkpoint: {path}")
    with TemporaryDirectory(dir=FOLDER) as scratch:
        made = make_checkpoint(
            Path(scratch) / "plain",
            family,
            dtype="bfloat16" if form else "float32",
            # Rounding in a layer of experts may choose other experts in the next one.
            num_layers=1 if form else 6,
            num_experts=32,
            top_k=4,
            hidden_size=256,
            intermediate_size=128,
        )
        if form:
            from vllm_moe_offload.quantised_checkpoints import quantise_checkpoint

            made = quantise_checkpoint(made, Path(scratch) / form, form)
        made.rename(path)  # only a complete one gets the name
    return path
