"""Tests of what the benchmarks conclude from what they measure."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    # As in the tests of the kernels, which these import first: read when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
