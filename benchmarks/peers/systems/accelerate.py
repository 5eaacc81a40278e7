"""Accelerate: transformers, with hooks that copy a layer to the GPU when it is its turn."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

from peers.client import OpenAI
from peers.peer import MODEL_NAME, Absent, Setup, not_installed

_INSTALL = "pip install accelerate, in the environment that runs this."
_SCRIPT = str(Path(__file__).parents[1] / "transformers_server.py")


class Accelerate:
    """A small server around ``generate``, with ``device_map="auto"`` within a limit of memory."""

    name = "Accelerate"
    dialect = OpenAI(MODEL_NAME, returns_ids=True)
    idles_quietly = False

    def absent(self, setup: Setup) -> Absent | None:
        """Why it cannot run here, None if it can."""
        there = importlib.util.find_spec("accelerate") is not None
        return None if there else not_installed(_INSTALL)

    def prepare(self, setup: Setup) -> None:
        """Nothing: it reads the checkpoint."""

    def command(self, setup: Setup) -> list[str]:
        """Command line of the server."""
        gpu = ["--gpu-bytes", str(_gpu_bytes(setup))] if setup.has_gpu else []
        return [sys.executable, _SCRIPT, str(setup.checkpoint), "--dtype", setup.dtype, *gpu]

    def environment(self, setup: Setup) -> Mapping[str, str]:
        """The checkpoint is here."""
        return {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}


def _gpu_bytes(setup: Setup) -> int:
    """The share of the experts, what is no expert, and the room to copy one more layer into."""
    experts = setup.shape.pool_bytes * setup.item_bytes // 2
    whole = sum(file.stat().st_size for file in setup.checkpoint.glob("*.safetensors"))
    return int(setup.share * experts) + whole - experts + experts // setup.shape.moe_layers
