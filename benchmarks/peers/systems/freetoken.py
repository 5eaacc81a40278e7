"""FreeToken: an engine of its own with a cache of experts on the GPU."""

import os
import shutil
from collections.abc import Mapping

from peers.client import OpenAI
from peers.peer import MODEL_NAME, NEEDS_GPU, Absent, Setup, not_installed

_INSTALL = (
    'Install it in an environment of its own (pip install "freetoken[accel]") and set FREETOKEN '
    "to its program ft."
)


class FreeToken:
    """``ft serve`` with a share of all experts in its cache; its strategy is its own choice."""

    name = "FreeToken"
    dialect = OpenAI(MODEL_NAME, takes_ids=False)
    idles_quietly = False

    def absent(self, setup: Setup) -> Absent | None:
        """Why it cannot run here, None if it can."""
        if _program() is None:
            return not_installed(_INSTALL)
        return None if setup.has_gpu else NEEDS_GPU

    def prepare(self, setup: Setup) -> None:
        """Nothing: it reads the checkpoint."""

    def command(self, setup: Setup) -> list[str]:
        """Command line of the server."""
        sizes = {
            "--max-running-requests": setup.largest_batch,
            "--max-seq-len-override": setup.context,
            "--max-prefill-length": setup.chunk,
            "--num-tokens": setup.kv_tokens,
            "--moe-cache-rate": setup.share,
            "--cache-type": "naive",  # no reuse of prompts
        }
        return [
            str(_program()), "serve", "--model", str(setup.checkpoint),
            "--served-model-name", MODEL_NAME,
            *(str(word) for option in sizes.items() for word in option),
        ]  # fmt: skip

    def environment(self, setup: Setup) -> Mapping[str, str]:
        """Nothing of its own."""
        return {}


def _program() -> str | None:
    """Only what FREETOKEN names: other programs are called ft too."""
    named = os.environ.get("FREETOKEN")
    return shutil.which(named) if named else None
