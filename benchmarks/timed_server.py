"""One vLLM engine in a process of its own, timed step by step. Called by ``jobs.py``.

Reads a job as one line of JSON from the standard input, after vLLM has been imported; says that
its server is ready; measures when the next line comes. The file of its rows grows with each
measurement.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import routing
from cores import on_core
from server import Server, fill_dummies_quickly
from shapes import SHAPES

TOP_KERNELS = 40
"""Lines of a profile."""

MAX_REPEATS, REPEAT_SECONDS = 12, 1.5
"""How often, and for how long, a case is measured again."""

SETTLE_STEPS = 30
"""Decode steps after which the residents are the experts that routing was confined to."""


class Talk:
    """How a process talks to the one that called it.

    Args:
        job: what it was asked.
        out: file of its rows.
        ready: file whose presence says that the process waits for its turn.
    """

    def __init__(self, job: dict[str, Any], out: Path, ready: Path) -> None:
        self._name, self._out, self._ready = job["name"], out, ready
        self._rows: list[dict[str, Any]] = []

    def note(self, row: dict[str, Any]) -> None:
        """Take a finished row."""
        self._rows.append(row)
        self._write(None)
        print(json.dumps({"configuration": self._name, **row}), flush=True)

    def wait_for_turn(self) -> None:
        """Say that everything is ready, and come back when nobody else is measured."""
        self._ready.touch()
        sys.stdin.readline()

    def end(self) -> None:
        """Measure the link beside what was measured."""
        self._write(link_rate())

    def _write(self, rate: float | None) -> None:
        self._out.write_text(json.dumps({"rows": self._rows, "copy_gb_s": rate}))


def time_server(job: dict[str, Any], folder: Path, talk: Talk) -> None:
    """Time decode steps and prompts under uniform routing."""
    server, strategy = started(job, folder, talk)
    talk.wait_for_turn()
    for row in measured(server, strategy, job):
        talk.note(row)


def started(
    job: dict[str, Any], folder: Path, talk: Talk
) -> tuple[Server, routing.UniformOverSome]:
    """A server with dummy weights, and what routes its tokens."""
    strategy = routing.UniformOverSome()
    routing.register(strategy)
    filled = fill_dummies_quickly()
    start = time.perf_counter()
    server = Server(folder, SHAPES[job["shape"]], job)
    assert filled or job["server"] != "plugin", "dummy weights were drawn slowly"
    talk.note({"case": "start", "seconds": time.perf_counter() - start})
    return server, strategy


def measured(
    server: Server, strategy: routing.UniformOverSome, job: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of everything that a job asks for."""
    # Fills the slots that are empty, so that 100 % in slots means just that from here on.
    server.prefill(job["settings"]["max_num_batched_tokens"], repeats=1, warm_up=0)
    confined = None
    for plan in sorted(job["measurements"], key=lambda plan: plan.get("confined") or 0):
        if plan.get("confined") != confined:
            confined = plan["confined"]
            strategy.confine(confined)
            if job["server"] == "plugin":
                server.decode(max(_batches(job)), SETTLE_STEPS)
        options = {name: plan[name] for name in ("warm_up",) if name in plan}
        if plan["case"] == "decode":
            row = quickest(lambda p=plan, o=options: server.decode(p["batch"], p["steps"], **o))
        else:
            row = server.prefill(plan["tokens"], plan["repeats"], **options)
        yield {**row, "confined": confined} if confined else row
    if job["server"] == "plugin" and job["share"] <= 0.25:  # it reads back all slots
        server.offload_engine().check_integrity()


def quickest(
    measure: Callable[[], dict[str, Any]],
    seconds: float = REPEAT_SECONDS,
    most: float = MAX_REPEATS,
) -> dict[str, Any]:
    """Measure again while that is cheap, each time on another core, and take the least.

    What the host does besides lengthens steps of a few milliseconds by a half; it only ever adds,
    and that holds for all servers. Long steps do not notice it.

    Args:
        measure: does the same each time.
        seconds: after which no repeat begins.
        most: repeats.
    """
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    while not rows or (len(rows) < most and time.perf_counter() - start < seconds):
        with on_core(len(rows), MAX_REPEATS):
            rows.append(measure())
    row = min(rows, key=lambda row: row["seconds"])
    return {**row, "repeats_seconds": [each["seconds"] for each in rows]}


def _batches(job: dict[str, Any]) -> list[int]:
    return [plan["batch"] for plan in job["measurements"] if plan["case"] == "decode"]


def profile_server(job: dict[str, Any], folder: Path, talk: Talk) -> None:
    """Tell which kernels the time of one case goes to, in a text file.

    The file's head holds the time of a step by the clock, unprofiled, and what its kernels and
    copies add up to: what is missing between the two, the device had nothing to do in.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    strategy = routing.UniformOverSome()
    routing.register(strategy)
    fill_dummies_quickly()
    server = Server(folder, SHAPES[job["shape"]], job)
    talk.wait_for_turn()
    server.prefill(job["settings"]["max_num_batched_tokens"], repeats=1, warm_up=0)
    (plan,) = job["measurements"]
    if plan["case"] == "decode":
        steps = plan["steps"]
        row = server.decode(plan["batch"], steps)
        server.start_decode(plan["batch"], steps + 8)
        for _ in range(8):
            server.step()
    else:
        steps = 1
        row = server.prefill(plan["tokens"], 1)
        server.add([1] * plan["tokens"], 1)
    server.synchronize()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        if plan["case"] == "decode":
            for _ in range(steps):
                server.step()
        else:
            server.finish()
        server.synchronize()
    server.finish()
    text, busy = _kernel_table(recorded.key_averages(), steps)
    head = f"{job['name']}, {plan['case']} {plan.get('batch') or plan.get('tokens')}"
    Path(job["profile"]).write_text(
        f"{head}: {row['seconds'] * 1e3:.3f} ms a step; what ran on the device adds up to "
        f"{busy:.3f} ms, side by side or not\n{text}\n"
    )
    talk.note({**row, "device_busy_seconds": busy / 1e3})


def _kernel_table(averages: Any, steps: int) -> tuple[str, float]:
    """Kernels and copies by time, and their sum in ms a step; on a CPU its operations."""
    import torch

    on_gpu = torch.cuda.is_available()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    ran = [
        (getattr(event, field) / steps / 1e3, event.count / steps, event.key)
        for event in averages
        if not on_gpu or str(event.device_type).endswith("CUDA")
    ]
    lines = [f"{ms:9.3f} ms {count:8.1f} x  {name}" for ms, count, name in sorted(ran)[::-1]]
    return "\n".join(lines[:TOP_KERNELS]), sum(ms for ms, _, _ in ran)


def time_resolve(job: dict[str, Any], _folder: Path, talk: Talk) -> None:
    """Time resolve and a gather that has nothing to do, all experts in slots."""
    import layers

    engine = layers.build(1, 1.0)
    talk.wait_for_turn()
    for plan in job["measurements"]:
        seconds = layers.resolve_time(engine, plan["batch"])
        talk.note({"case": "resolve", "batch": plan["batch"], "seconds": seconds})
    engine.close()


def replay_trace(job: dict[str, Any], folder: Path, talk: Talk) -> None:
    """Let the model route as a trace says, a token a step, and count the hits.

    Both the engine and the simulator start with empty slots: warm-up and capture have moved
    experts, so the slots are emptied and the trace is rewound before the count.
    """
    import torch

    from vllm_moe_offload.trace import load

    plan = job["measurements"][0]
    ids_NLK = load(plan["trace"]).expert_ids[: plan["tokens"]]
    shape, tokens = SHAPES[job["shape"]], len(ids_NLK)
    _, layers, top_k = ids_NLK.shape
    assert (layers, top_k) == (shape.moe_layers, shape.top_k), "the trace is of another model"
    strategy = routing.TraceReplay(torch.from_numpy(ids_NLK.astype("int32")))
    routing.register(strategy)
    fill_dummies_quickly()
    server = Server(folder, shape, job)
    talk.wait_for_turn()
    for part in range(plan.get("repeats", 1)):
        empty_slots(server.offload_engine())
        strategy.rewind()
        # The prompt is one token too, so that every step of the model is one of the trace.
        server.add([part + 1], tokens)
        server.synchronize()
        start = time.perf_counter()
        server.finish()
        server.synchronize()
        seconds = time.perf_counter() - start
        assert strategy.position == tokens, f"{strategy.position} of {tokens} tokens were routed"
        stats = server.stats()
        assert stats is not None
        row = {"case": "trace", "tokens": tokens, "seconds": seconds / tokens}
        counted = {name: stats[name] for name in ("active", "hits", "misses")}
        counted["hit_ratio"] = stats["hits"] / stats["active"]
        talk.note({**row, **counted, "bytes": stats["bytes_moved"] / tokens})
    server.offload_engine().check_integrity()


def empty_slots(engine: Any) -> None:
    """Make an engine forget who is resident, what it counted and what eviction has learned."""
    for layer in range(len(engine.specs)):
        residency = engine.residency(layer)
        fresh = type(residency.tables).empty(
            residency.num_experts, residency.num_slots, engine.device
        )
        for name, tensor in vars(residency.tables).items():
            if hasattr(tensor, "copy_"):
                tensor.copy_(getattr(fresh, name))
    engine.forget_routing()
    engine.reset_stats()


KINDS = {
    "server": time_server,
    "resolve": time_resolve,
    "trace": replay_trace,
    "profile": profile_server,
}


def link_rate() -> float:
    """GB/s of pinned copies beside whatever holds the GPU's memory now."""
    import layers
    import torch

    return layers.copy_rate() / 1e9 if torch.cuda.is_available() else 10.0


def main() -> int:
    """Import vLLM, wait for a job, write its rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ready", type=Path, required=True)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = routing.STRATEGY
    # Slow, and nothing that is measured meanwhile in another process would notice.
    importlib.import_module("vllm.model_executor.models.qwen3_moe")
    importlib.import_module("vllm.entrypoints.llm")

    job = json.loads(sys.stdin.readline())
    talk = Talk(job, args.out, args.ready)
    with tempfile.TemporaryDirectory() as folder:
        KINDS[job["kind"]](job, Path(folder), talk)
    talk.end()
    return 0


if __name__ == "__main__":
    sys.exit(main())
