"""An engine with a shared KV cache that is killed under load, and another that starts after it.

    python killed.py CHECKPOINT OPTIONS

``OPTIONS`` are those of ``LLM`` as JSON; the plugin's are left at their defaults. vLLM is imported
once, which takes longer than a start: both engines are forks. Prints ``RESULT`` and JSON at the
end.
"""

import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import sharing

PROMPTS = sharing.prompts(48, 80)
ANSWERS = [24 + 7 * number % 60 for number in range(len(PROMPTS))]
"""Tokens of each; they end at different times, so that some are always running."""

RUNNING = 16
"""Requests at a time."""

ORDERS = 3
"""Given before the kill: one to start with, and more because requests need blocks."""


def run(path: Path, options: dict[str, Any], variables: dict[str, str]) -> dict[str, Any]:
    """Run both engines in a process of their own, and return what was found."""
    result = subprocess.run(
        [sys.executable, "-P", __file__, str(path), json.dumps(options)],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    found: dict[str, Any] = json.loads(result.stdout.rsplit("RESULT ", 1)[1].splitlines()[0])
    return found


def check(found: dict[str, Any]) -> None:
    """Raise unless the first engine moved, and the second started from nothing and served all."""
    assert found["orders_before"] >= ORDERS
    assert found["answers_before"] < len(PROMPTS)
    assert found["lengths"] == ANSWERS
    assert found["lent_at_first"] == found["most"] > 0
    assert found["exit"] == 0


def main() -> None:
    """Run both engines."""
    path, options = sys.argv[1], json.loads(sys.argv[2])
    _import_vllm()
    found = {**_killed(path, options), **_to_the_end(path, options)}
    print("RESULT " + json.dumps(found))


def _import_vllm() -> None:
    import torch

    for name in ("entrypoints.llm", "v1.engine.llm_engine", "v1.worker.gpu_worker"):
        importlib.import_module(f"vllm.{name}")
    assert not torch.cuda.is_initialized(), "what is forked now could not use a GPU"
    # On a GPU this is of no meaning.
    sharing.let_layers_lie_side_by_side(
        importlib.import_module("vllm.v1.attention.backends.cpu_attn")
    )


def _killed(path: str, options: dict[str, Any]) -> dict[str, int]:
    """Kill an engine while the boundary moves; its answers by then, and the orders it has given."""
    with _Engine(path, options) as engine:
        answers, orders = 0, 0
        while answers < len(PROMPTS) // 4 or orders < ORDERS:
            message = engine.says.recv()
            assert "end" not in message, f"served all after {orders} orders"
            answers, orders = answers + 1, message["orders"]
        os.kill(engine.process.pid, signal.SIGKILL)
        engine.process.join(60)
        assert engine.process.exitcode == -signal.SIGKILL, engine.process.exitcode
    return {"answers_before": answers, "orders_before": orders}


def _to_the_end(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Let an engine serve everything."""
    with _Engine(path, options) as engine:
        lengths = [0] * len(PROMPTS)
        while "end" not in (message := engine.says.recv()):
            lengths[message["number"]] += message["tokens"]
        engine.process.join(60)
    return {"lengths": lengths, "exit": engine.process.exitcode, **message["end"]}


class _Engine:
    """An engine in a process of its own, and what it says."""

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("fork")
        self.says, ours = context.Pipe(duplex=False)
        self.process = context.Process(target=_serve, args=(path, options, ours))
        self.process.start()
        ours.close()  # A process that ends is then noticed here.

    def __enter__(self) -> "_Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()


def _serve(path: str, options: dict[str, Any], tells: Connection) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(path, plugin="moe-offload", max_num_seqs=RUNNING, **options)
    lending = sharing.core_of(llm).scheduler.moe_offload_lending
    book, first = lending.lender.book, lending.lender.ledger.lent
    engine = llm.llm_engine
    for number, prompt in enumerate(PROMPTS):
        sampling = SamplingParams(max_tokens=ANSWERS[number], temperature=0, ignore_eos=True)
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                number, tokens = int(output.request_id), len(output.outputs[0].token_ids)
                tells.send({"number": number, "tokens": tokens, "orders": book._last.number})
    sharing.check(llm)
    boundary = lending.lender.boundary
    tells.send({"end": {"lent_at_first": first, "most": boundary.max_increments}})


if __name__ == "__main__":
    main()
