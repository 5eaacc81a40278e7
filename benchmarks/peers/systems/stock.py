"""vLLM with all experts on the GPU: what the others are compared with."""

from peers.systems.vllm_server import VllmServer


class Stock(VllmServer):
    """vLLM without offloading."""

    def __init__(self) -> None:
        super().__init__("vLLM resident", needs_gpu=False)
