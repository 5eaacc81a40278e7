"""Kernels compile for the GPUs that there are, and their tiles fit into shared memory there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from formats_of_tests import FORMATS

SCRIPT = Path(__file__).with_name("compile_ahead.py")
KIB = 1024

LIMITS = {75: 64 * KIB, 80: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 120: 99 * KIB}
"""Shared memory of a program by compute capability. What is compiled for 8.0 is what 8.6 gets, so
it is held to what that has, which is less."""

ROUNDING = {"quantise_rows_kernel", "quantise_pairs_kernel"}
"""Kernels that only GPUs with e4m3 launch."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    variables = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache")}
    variables.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-P", str(SCRIPT), str(folder / "out.json")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(params=LIMITS)
def target(request):
    return request.param


@pytest.fixture
def builds(compiled, target):
    return [build for build in compiled["builds"] if build["target"] == target]


def test_everything_compiles(builds):
    assert {build["error"] for build in builds} == {None}


def test_everything_fits_into_shared_memory(builds, target):
    assert [build for build in builds if not 0 <= build["shared"] <= LIMITS[target]] == []


def test_nothing_is_left_out(compiled, builds, target):
    if target == 89:
        return  # what needs no e4m3 compiles as for 8.0
    kernels = {build["kernel"] for build in builds}
    assert kernels == set(compiled["kernels"]) - (ROUNDING if target < 89 else set())
    types = ("bfloat16", "float16") if target >= 80 else ("float16",)
    for name in FORMATS if target >= 89 else (n for n in FORMATS if not n.startswith("fp8")):
        for dtype in types:
            assert any(b["purpose"].startswith(f"{name}, torch.{dtype},") for b in builds), name
