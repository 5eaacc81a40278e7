"""KTransformers' kernels in SGLang: experts without a place on the GPU are computed by the CPU."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from peers.client import OpenAI
from peers.peer import MODEL_NAME, NEEDS_GPU, Absent, Setup, not_installed

_INSTALL = (
    "Install kt-kernel and its SGLang in an environment of their own (its install.sh) and set "
    "KTRANSFORMERS to that environment's python."
)


class KTransformers:
    """SGLang with a share of each layer's experts on the GPU."""

    name = "KTransformers"
    dialect = OpenAI(MODEL_NAME)
    idles_quietly = False

    def absent(self, setup: Setup) -> Absent | None:
        """Why it cannot run here, None if it can."""
        if _python() is None:
            return not_installed(_INSTALL)
        return None if setup.has_gpu else NEEDS_GPU

    def prepare(self, setup: Setup) -> None:
        """Nothing: it reads the checkpoint."""

    def command(self, setup: Setup) -> list[str]:
        """Command line of the server."""
        options = {
            "--model": setup.checkpoint,
            "--served-model-name": MODEL_NAME,
            "--kt-weight-path": setup.checkpoint,
            "--kt-method": "BF16",
            "--kt-num-gpu-experts": round(setup.share * setup.shape.num_experts),
            "--kt-cpuinfer": len(os.sched_getaffinity(0)),
            "--kt-threadpool-count": _numa_nodes(),
            "--context-length": setup.context,
            "--max-total-tokens": setup.kv_tokens,
            "--max-running-requests": setup.largest_batch,
            "--chunked-prefill-size": setup.chunk,
        }
        switches = ["--disable-radix-cache", "--disable-shared-experts-fusion"]
        words = [str(word) for option in options.items() for word in option]
        return [str(_python()), "-m", "sglang.launch_server", *words, *switches]

    def environment(self, setup: Setup) -> Mapping[str, str]:
        """Nothing of its own."""
        return {"PYTHONSAFEPATH": "1"}


def _python() -> str | None:
    named = os.environ.get("KTRANSFORMERS")
    return shutil.which(named) if named else None


def _numa_nodes() -> int:
    return max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))))
