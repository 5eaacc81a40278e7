"""``vllm serve``, as the four systems made of it share it."""

from collections.abc import Mapping

from peers.client import OpenAI
from peers.peer import MODEL_NAME, NEEDS_GPU, Absent, Setup
from vllm_moe_offload.demo.server import environment, program


class VllmServer:
    """A vLLM with options of its own.

    Args:
        name: for the table.
        needs_gpu: whether its way to offload exists on a GPU only.
    """

    idles_quietly = True

    def __init__(self, name: str, *, needs_gpu: bool) -> None:
        self.name = name
        self.dialect = OpenAI(MODEL_NAME, returns_ids=True)
        self._needs_gpu = needs_gpu

    def absent(self, setup: Setup) -> Absent | None:
        """Why it cannot run here, None if it can."""
        return NEEDS_GPU if self._needs_gpu and not setup.has_gpu else None

    def prepare(self, setup: Setup) -> None:
        """Nothing: it reads the checkpoint."""

    def options(self, setup: Setup) -> list[str]:
        """What this one adds to the command line."""
        return []

    def command(self, setup: Setup) -> list[str]:
        """Command line of the server."""
        sizes = {
            "--max-model-len": setup.context,
            "--max-num-seqs": setup.largest_batch,
            "--max-num-batched-tokens": setup.chunk,
            "--kv-cache-memory-bytes": setup.kv_bytes,
            "--gpu-memory-utilization": 0.05,  # of no meaning beside the size above, but checked
        }
        return [
            *program(), "serve", str(setup.checkpoint),
            "--served-model-name", MODEL_NAME, "--dtype", setup.dtype,
            "--no-enable-prefix-caching",
            *(str(word) for option in sizes.items() for word in option),
            *([] if setup.has_gpu else ["--enforce-eager"]),
            *self.options(setup), *setup.vllm_options,
        ]  # fmt: skip

    def environment(self, setup: Setup) -> Mapping[str, str]:
        """Without the plugin's option, vLLM shall not even load the plugin."""
        plugin = "--plugin" in self.options(setup)
        return environment(str(setup.checkpoint), not setup.has_gpu, plugin)
