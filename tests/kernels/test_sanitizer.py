"""Every kernel under NVIDIA's compute-sanitizer: no access out of bounds, no race."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("sanitize.py")
FOLDERS = ["/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"]


def sanitizer() -> str | None:
    folders = [os.environ["CUDA_HOME"] + "/bin"] if os.environ.get("CUDA_HOME") else []
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(folders + FOLDERS)
    )


def run(*before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-P", str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, **environment},
    )


def test_every_kernel_is_launched():
    result = run()
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it watches a GPU")
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is not installed here")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    binary = sanitizer()
    assert binary is not None
    result = run(
        binary, "--tool", tool, "--error-exitcode", "1",
        # Every tensor an allocation of its own, or what lies beyond one would be its neighbour.
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )  # fmt: skip
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    assert re.search(r"SUMMARY: 0 (errors|hazards)\b", result.stdout)
