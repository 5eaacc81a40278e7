"""Measure everything, on one GPU or several: each takes the next measurement when it is free.

    python benchmarks/everything.py --out benchmarks/results
    python benchmarks/everything.py --out FOLDER --only engine kernels --limit-s 560

Every GPU has its share of the processor cores, so that steps which wait for the host are not held
up by what is measured beside them. GPUs of one host share its memory, so servers get ready beside
each other and are timed in turn. A GPU that is named twice takes two measurements at a time, which
is for those that time nothing. A measurement that needs a trace is left out without ``--traces``.
At the end of ``--limit-s`` what still runs is asked to end; it has written what it has.
"""

import argparse
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

from turn import TURN_FILE

GRACE_S = 15.0
"""Seconds that a measurement has to end its servers."""

INTENT, SUMMARY, CHAT = (
    "deepseek-v2-lite.intent.npz",
    "deepseek-v2-lite.summary.npz",
    "qwen3-30b-a3b.chat.npz",
)


class Measurement(NamedTuple):
    """A command; words in braces are filled in, see ``command_of``."""

    name: str
    words: str

    @property
    def needs_traces(self) -> bool:
        """Whether it replays recorded routing."""
        return "{traces}" in self.words


RUN = "benchmarks/run.py --commit {commit}"

MEASUREMENTS = (
    Measurement("engine", RUN + " --suite engine --together 4 --out {out}/engine.json"),
    Measurement("shapes", RUN + " --suite shapes --together 3 --out {out}/shapes.json"),
    Measurement("growth", RUN + " --suite growth --together 4 --out {out}/growth.json"),
    Measurement("profile", RUN + " --profile plugin~0.25 decode 128 --out {out}/plugin.json"),
    Measurement(
        "profile-stock", RUN + " --profile cpu-offload~0.25 decode 128 --out {out}/cpu-offload.json"
    ),
    Measurement(
        "trace", RUN + f" --suite trace --trace {{traces}}/{INTENT} --out {{out}}/trace.json"
    ),
    Measurement(
        "prediction-deepseek",
        RUN + f" --suite prediction --trace {{traces}}/{INTENT} --learned {{traces}}/{SUMMARY}"
        " --together 3 --minutes {minutes} --out {out}/prediction-deepseek.json",
    ),
    Measurement(
        "prediction-qwen3",
        RUN + f" --suite prediction --trace {{traces}}/{CHAT} --shape qwen3-30b-a3b-16-top6"
        " --together 3 --minutes {minutes} --out {out}/prediction-qwen3.json",
    ),
    Measurement("quant", RUN + " --suite quant --together 9 --out {out}/quant.json"),
    Measurement("budget", RUN + " --suite budget --together 4 --out {out}/budget.json"),
    Measurement(
        "peers",
        "benchmarks/peers/run.py --commit {commit} --shape qwen3-30b-a3b-8 --together 4"
        " --new-tokens 32 --limit-s {seconds} --out {out}/peers.json",
    ),
    Measurement(
        "correctness",
        "benchmarks/correctness.py --commit {commit} --jobs {jobs} --out {out}/correctness.json",
    ),
    Measurement(
        "correctness-quantised",
        "benchmarks/quantised_correctness.py --commit {commit} --jobs {jobs}"
        " --out {out}/correctness-quantised.json",
    ),
    Measurement("layers", "benchmarks/layers.py --commit {commit} --out {out}/layers.json"),
    Measurement(
        "quantised-layers",
        "benchmarks/quantised_layers.py --commit {commit} --jobs {jobs}"
        " --out {out}/quantised-layers.json",
    ),
    Measurement("kernels", "-m pytest -q tests/kernels"),
    Measurement(
        "lending", "-m pytest -q tests/vllm/test_sharing_gpu.py tests/unit/test_lending_borrower.py"
    ),
)


def main() -> int:
    """Measure what was asked for; fails if a measurement does."""
    args = parse(sys.argv[1:])
    args.out.mkdir(parents=True, exist_ok=True)
    args.logs.mkdir(parents=True, exist_ok=True)
    waiting = asked_for(args)
    outcomes = measure(waiting, args, places(args.gpus, sorted(os.sched_getaffinity(0))))
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    return int(any(outcome != "done" for outcome in outcomes.values()))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    names = [measurement.name for measurement in MEASUREMENTS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--logs", type=Path, help="folder of what they print; default: logs in that of the results")
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--gpus", type=int, nargs="+", default=[0], metavar="NUMBER", help="the GPUs to use")
    add("--traces", type=Path, help="folder of recorded traces")
    add("--limit-s", type=float, default=float("inf"), help="end all after so many seconds")
    add("--commit", help="revision, where the tree has no repository")
    args = parser.parse_args(arguments)
    args.logs = args.logs or args.out / "logs"
    return args


def asked_for(args: argparse.Namespace) -> list[Measurement]:
    """The measurements in the order in which they were named."""
    by_name = {measurement.name: measurement for measurement in MEASUREMENTS}
    asked = [by_name[name] for name in args.only]
    for measurement in asked:
        if measurement.needs_traces and not args.traces:
            print(f"{measurement.name}: left out, it needs --traces")
    return [m for m in asked if args.traces or not m.needs_traces]


class Place(NamedTuple):
    """Where one measurement runs at a time."""

    gpu: int
    cores: list[int]


def places(gpus: list[int], cores: list[int]) -> list[Place]:
    """One for each GPU that is named, with an even part of the processor cores.

    Where there are fewer cores than places, all have all of them.
    """
    each = len(cores) // len(gpus)
    if not each:
        return [Place(gpu, cores) for gpu in gpus]
    return [Place(gpu, cores[i * each : (i + 1) * each]) for i, gpu in enumerate(gpus)]


def command_of(
    measurement: Measurement, args: argparse.Namespace, left_s: float, cores: int
) -> list[str]:
    """Words of the command for what is left of the time.

    Args:
        measurement: what to run.
        args: the command line.
        left_s: seconds until everything ends.
        cores: how many processes may compute.
    """
    room_s = max(left_s - 60, 1)  # for servers that have begun
    values = {
        "out": args.out, "traces": args.traces, "commit": args.commit, "jobs": max(cores - 2, 1),
        "minutes": f"{min(room_s / 60, 1e4):.1f}", "seconds": f"{min(room_s, 1e6):.0f}",
    }  # fmt: skip
    words = measurement.words
    if not args.commit:
        words = words.replace(" --commit {commit}", "")
    filled = [word.format(**values).replace("~", " ") for word in words.split()]
    return [sys.executable, *filled]


def measure(
    waiting: list[Measurement], args: argparse.Namespace, where: list[Place]
) -> dict[str, str]:
    """Run all measurements, one at a time in each place.

    Returns:
        What became of each: ``done``, ``failed (STATUS)`` or ``not begun``.
    """
    start = time.monotonic()
    todo: queue.SimpleQueue[Measurement] = queue.SimpleQueue()
    for measurement in waiting:
        todo.put(measurement)
    outcomes = dict.fromkeys((m.name for m in waiting), "not begun")

    def work(place: Place) -> None:
        while (left := args.limit_s - (time.monotonic() - start)) > GRACE_S:
            try:
                measurement = todo.get_nowait()
            except queue.Empty:
                return
            command = command_of(measurement, args, left, len(place.cores))
            log = args.logs / f"{measurement.name}.log"
            status = _run(command, place, log, left - GRACE_S, args.logs / "turn")
            outcome = "done" if status == 0 else f"failed ({status})"
            outcomes[measurement.name] = outcome
            elapsed = time.monotonic() - start
            print(f"[{elapsed:4.0f} s] GPU {place.gpu}: {measurement.name}: {outcome}", flush=True)

    threads = [threading.Thread(target=work, args=(place,)) for place in where]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def _run(command: list[str], place: Place, log: Path, limit_s: float, turn: Path) -> int:
    """Run a command to its end or the limit; what it has started ends with it."""
    pinned = ["taskset", "--cpu-list", ",".join(map(str, place.cores)), *command]
    environment = {
        **os.environ, "CUDA_VISIBLE_DEVICES": str(place.gpu), "PYTHONUNBUFFERED": "1",
        TURN_FILE: str(turn.resolve()),
    }  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            pinned, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        for number, seconds in ((signal.SIGTERM, limit_s), (signal.SIGKILL, GRACE_S)):
            try:
                return process.wait(min(seconds, threading.TIMEOUT_MAX))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, number)
        return process.wait()


if __name__ == "__main__":
    sys.exit(main())
