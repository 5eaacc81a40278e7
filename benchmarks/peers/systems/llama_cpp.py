"""llama.cpp: experts of some layers stay in host memory and are computed by the CPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from peers.client import LlamaCpp as Dialect
from peers.client import PeerError
from peers.peer import Absent, Setup, not_installed

_INSTALL = (
    "Clone and build llama.cpp (cmake -B build -DGGML_CUDA=ON && cmake --build build) and set "
    "LLAMA_CPP to the clone; its convert_hf_to_gguf.py needs the gguf package of the clone."
)
_CONVERT = str(Path(__file__).parents[1] / "convert_to_gguf.py")
_LOG_TAIL = 2000


class LlamaCpp:
    """``llama-server`` with ``--n-cpu-moe``."""

    name = "llama.cpp"
    dialect = Dialect()
    idles_quietly = False

    def absent(self, setup: Setup) -> Absent | None:
        """Why it cannot run here, None if it can."""
        complete = _server().is_file() and (_clone() / "convert_hf_to_gguf.py").is_file()
        return None if complete else not_installed(_INSTALL)

    def prepare(self, setup: Setup) -> None:
        """Convert the checkpoint to GGUF, in the same precision."""
        kind = {"bfloat16": "bf16", "float32": "f32"}[setup.dtype]
        command = [sys.executable, _CONVERT, str(_clone()), str(setup.checkpoint),
                   "--outfile", str(_file(setup)), "--outtype", kind]  # fmt: skip
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerError(f"could not be given the checkpoint:\n{done.stderr[-_LOG_TAIL:]}")

    def command(self, setup: Setup) -> list[str]:
        """Command line of the server."""
        shape = setup.shape
        away = round((1 - setup.share) * shape.moe_layers)
        if away:
            away += shape.num_layers - shape.moe_layers  # the first layers count, experts or not
        options = {
            "--model": _file(setup),
            "--ctx-size": setup.kv_tokens,
            "--parallel": setup.largest_batch,
            "--batch-size": setup.chunk,
            "--ubatch-size": setup.chunk,
            "--n-gpu-layers": 999 if setup.has_gpu else 0,
            "--n-cpu-moe": away,
        }
        words = [str(word) for option in options.items() for word in option]
        return [str(_server()), *words, "--kv-unified"]

    def environment(self, setup: Setup) -> Mapping[str, str]:
        """Nothing of its own."""
        return {}


def _clone() -> Path:
    return Path(os.environ.get("LLAMA_CPP", "llama.cpp")).absolute()


def _server() -> Path:
    built = _clone() / "build" / "bin" / "llama-server"
    return built if built.is_file() else Path(shutil.which("llama-server") or built)


def _file(setup: Setup) -> Path:
    return setup.work / f"{setup.checkpoint.name}.gguf"
