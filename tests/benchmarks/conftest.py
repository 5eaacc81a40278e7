"""Tests of what the benchmarks conclude from what they measure."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # As in the tests of the kernels, which these import first: read when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture(autouse=True, scope="module")
def torch_operations() -> Iterator[None]:
    """Run the engine's torch forms here: what the kernels do is not in question."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield
