"""What the documentation says is true: its commands run, its figures and messages are there."""

import os
import sys
from pathlib import Path

import cpu_settings
import torch

# Before vLLM is imported: it reads its environment once.
os.environ.update(cpu_settings.env("any"))

if not torch.cuda.is_available():
    # As in the tests of the kernels, which benchmarks import: read when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
