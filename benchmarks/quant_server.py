"""``timed_server.py`` with the shapes of quantised models. Called by ``jobs.py``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH keeps it off

import timed_server
from quant import QUANT_SHAPES
from shapes import SHAPES

if __name__ == "__main__":
    SHAPES.update(QUANT_SHAPES)
    sys.exit(timed_server.main())
