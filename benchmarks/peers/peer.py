"""What a system has to say of itself to be measured beside the others."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shapes import LatentShape, Shape

from peers.client import Dialect

MODEL_NAME = "peer"
"""Name under which every server offers the checkpoint."""

_BLOCK_TOKENS = 128
"""Tokens by which a sequence may round its KV cache up; vLLM's largest block, on the CPU."""


@dataclass(frozen=True)
class Setup:
    """What is the same for all systems of a run.

    Args:
        checkpoint: folder in Hugging Face format.
        shape: its sizes.
        work: folder for files that a system makes of the checkpoint.
        share: part of the experts that stays on the GPU, 0 to 1.
        dtype: of weights and computation, ``bfloat16`` or ``float32``.
        has_gpu: whether there is one to run on.
        long_prompt: tokens of the prompt whose first token is timed.
        short_prompt: tokens of a prompt of a batch, at most.
        new_tokens: tokens that each prompt is continued by.
        batches: numbers of sequences that decode together.
        vllm_options: what every vLLM command line has besides.
    """

    checkpoint: Path
    shape: Shape
    work: Path
    share: float
    dtype: str
    has_gpu: bool
    long_prompt: int
    short_prompt: int
    new_tokens: int
    batches: tuple[int, ...]
    vllm_options: tuple[str, ...] = ()

    @property
    def largest_batch(self) -> int:
        """Sequences that a server must take at once."""
        return max(self.batches)

    @property
    def context(self) -> int:
        """Tokens of the longest sequence, rounded up."""
        longest = max(self.long_prompt, self.short_prompt) + self.new_tokens
        return -(-(longest + 1) // _BLOCK_TOKENS) * _BLOCK_TOKENS

    @property
    def chunk(self) -> int:
        """Prompt tokens that a server takes in one step."""
        return max(512, min(8192, self.context))

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache must hold at once."""
        short = self.short_prompt + self.new_tokens + _BLOCK_TOKENS
        return max(self.context, self.largest_batch * short) + 4 * _BLOCK_TOKENS

    @property
    def kv_bytes(self) -> int:
        """Bytes of a KV cache of so many tokens."""
        shape = self.shape
        if isinstance(shape, LatentShape):
            values = shape.kv_lora_rank + shape.rope_head_dim
        else:
            values = 2 * shape.kv_heads * shape.head_dim
        return self.kv_tokens * shape.num_layers * values * self.item_bytes

    @property
    def item_bytes(self) -> int:
        """Bytes of one weight."""
        return 4 if self.dtype == "float32" else 2

    @property
    def host_gib(self) -> float:
        """GiB of the experts that are not on the GPU."""
        return (1 - self.share) * self.shape.pool_bytes * self.item_bytes / 2 / 2**30


@dataclass(frozen=True)
class Absent:
    """Why a system cannot be measured here.

    Args:
        status: in a word or two, for the table.
        remedy: what would let it run.
    """

    status: str
    remedy: str


NEEDS_GPU = Absent("needs a GPU", "Run it on a machine with an NVIDIA GPU.")


def not_installed(remedy: str) -> Absent:
    """A system that is not there, and how to install it."""
    return Absent("not installed", remedy)


class Peer(Protocol):
    """A system that serves the checkpoint over HTTP, in processes of its own."""

    name: str
    dialect: Dialect
    idles_quietly: bool
    """Whether its server takes no time of GPU and processors while it is asked nothing."""

    def absent(self, setup: Setup) -> Absent | None:
        """Why it cannot run here, None if it can."""

    def prepare(self, setup: Setup) -> None:
        """Make files that the server needs beside the checkpoint."""

    def command(self, setup: Setup) -> list[str]:
        """Command line of the server, to which ``--host`` and ``--port`` are added."""

    def environment(self, setup: Setup) -> Mapping[str, str]:
        """Environment variables of the server, on top of ours."""
