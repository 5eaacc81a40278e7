"""vLLM's ``--cpu-offload-gb``: matrix products read weights in host memory through the link."""

from peers.peer import Setup
from peers.systems.vllm_server import VllmServer


class CpuOffload(VllmServer):
    """vLLM with the experts of so many layers, and nothing else, in host memory."""

    def __init__(self) -> None:
        super().__init__("vLLM --cpu-offload-gb", needs_gpu=True)

    def options(self, setup: Setup) -> list[str]:
        """Bytes and the parameters that they are taken from."""
        size = f"{setup.host_gib:.6f}"
        return ["--cpu-offload-gb", size, "--cpu-offload-params", "experts"]
