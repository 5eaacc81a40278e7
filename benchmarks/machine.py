"""What every result file says about where it came from."""

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def provenance(commit: str | None = None) -> dict[str, Any]:
    """Command, commit and machine of the running measurement.

    Args:
        commit: revision of the code where the tree has no repository.
    """
    import torch

    gpu = torch.cuda.is_available()
    return {
        "command": " ".join(["python", *map(without_folder, sys.argv)]),
        "commit": commit or _commit(),
        "machine": {
            "device": torch.cuda.get_device_name() if gpu else "CPU",
            "device_memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1) if gpu else None,
            "driver": _driver() if gpu else None,
            "processor": f"{_processor()}, {_cores()} cores",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "vllm": version("vllm"),
        },
    }


def without_folder(argument: str) -> str:
    """Leave out where things lie on the measuring machine."""
    return Path(argument).name if argument.startswith("/") else argument


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))
