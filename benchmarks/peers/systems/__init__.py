"""All systems, in the order of the table: the reference first."""

from peers.peer import Peer
from peers.systems.accelerate import Accelerate
from peers.systems.cpu_offload import CpuOffload
from peers.systems.freetoken import FreeToken
from peers.systems.ktransformers import KTransformers
from peers.systems.llama_cpp import LlamaCpp
from peers.systems.plugin import Plugin
from peers.systems.prefetch import Prefetch
from peers.systems.stock import Stock


def all_peers() -> list[Peer]:
    """Every system that is known; the first is what the others' texts are compared with."""
    return [
        Stock(), Plugin(), CpuOffload(), Prefetch(),
        FreeToken(), LlamaCpp(), KTransformers(), Accelerate(),
    ]  # fmt: skip
