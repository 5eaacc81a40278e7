"""This plugin."""

from peers.peer import Setup
from peers.systems.vllm_server import VllmServer


class Plugin(VllmServer):
    """vLLM with this plugin and a share of the experts in slots."""

    def __init__(self) -> None:
        super().__init__("this plugin", needs_gpu=False)

    def options(self, setup: Setup) -> list[str]:
        """The plugin's."""
        return ["--plugin", "moe-offload", "--moe-offload-cache-fraction", str(setup.share)]
