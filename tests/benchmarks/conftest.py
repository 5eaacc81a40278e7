"""Tests of what the benchmarks conclude from what they measure."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
