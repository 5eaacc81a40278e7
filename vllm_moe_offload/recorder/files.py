"""Files of one recorder: traces that are rewritten until they are large enough.

A file holds whole sequences for as long as it is the current one: each save writes all of it
again, in place of what was there. Once it has its size it is complete, and sequences that go on
do so in the next file, as sequences of their own.

Legend: T tokens, L layers, K choices a token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.recorder.sequences import SortedTokens
from vllm_moe_offload.trace import SUFFIX, Trace


@dataclass(frozen=True)
class TraceInfo:
    """What is the same in all files of a recorder."""

    num_experts: int
    model: str
    source: str


class TraceFiles:
    """Holds the tokens of the current file, and writes it.

    Args:
        directory: where the files are.
        stem: beginning of their names, of this recorder alone.
        info: what they say about themselves.
        max_bytes: size of a complete file before compression.
        complain: takes a line when the disk refuses.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        info: TraceInfo,
        *,
        max_bytes: int,
        complain: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._stem = stem
        self._info = info
        self._max_bytes = max_bytes
        self._complain = complain
        self._number = 1
        self._parts: dict[int, list[SortedTokens]] = {}
        self._held_tokens = 0
        self._saved_tokens = 0
        self.lost_tokens = 0
        """Tokens that no file took."""

    @property
    def path(self) -> Path:
        """The current file; it exists once something has been saved."""
        return self._directory / f"{self._stem}-{self._number:04d}{SUFFIX}"

    def add(self, tokens: SortedTokens) -> None:
        """Put tokens into the current file, and complete as many files as get full."""
        room = self._room(tokens)
        while len(tokens.sequence_N) >= room:
            self._hold(_cut(tokens, 0, room))
            tokens = _cut(tokens, room, None)
            self._complete()
            room = self._room(tokens)
        self._hold(tokens)

    def save(self) -> bool:
        """Write the current file if there is something new in it.

        Returns:
            False if the disk refuses; the tokens are then kept for the next time.
        """
        if self._saved_tokens == self._held_tokens:
            return True
        try:
            self._trace().save(self.path)
        except OSError as error:
            self._complain(
                f"cannot write {self.path}: {error.strerror or error}. Free space on that disk or "
                "make the directory writable; until then at most one file's worth of what is "
                "recorded is kept in memory, and the server is not affected"
            )
            return False
        self._saved_tokens = self._held_tokens
        return True

    def _complete(self) -> None:
        """End the current file. What the disk refuses now has no place any more."""
        if not self.save():
            self.lost_tokens += self._held_tokens - self._saved_tokens
        if self._saved_tokens:
            self._number += 1
        self._parts.clear()
        self._held_tokens = self._saved_tokens = 0

    def _room(self, tokens: SortedTokens) -> int:
        per_token = int(np.prod(tokens.ids_NLK.shape[1:])) * tokens.ids_NLK.itemsize + 1
        return max(1, self._max_bytes // per_token - self._held_tokens)

    def _hold(self, tokens: SortedTokens) -> None:
        sequence_N = tokens.sequence_N
        if not sequence_N.size:
            return
        starts = np.flatnonzero(np.append(True, sequence_N[1:] != sequence_N[:-1]))
        for start, stop in zip(starts, [*starts[1:], sequence_N.size], strict=True):
            self._parts.setdefault(int(sequence_N[start]), []).append(_cut(tokens, start, stop))
        self._held_tokens += sequence_N.size

    def _trace(self) -> Trace:
        parts = [part for sequence in self._parts.values() for part in sequence]
        lengths = [
            sum(part.sequence_N.size for part in sequence) for sequence in self._parts.values()
        ]
        ids_TLK: Any = np.concatenate([part.ids_NLK for part in parts])
        is_decode_T: NDArray[np.bool_] = np.concatenate([part.is_decode_N for part in parts])
        return Trace(
            expert_ids=ids_TLK,
            sequence_starts=np.cumsum([0, *lengths]).astype(np.int64),
            num_experts=self._info.num_experts,
            model=self._info.model,
            source=self._info.source,
            is_decode=is_decode_T,
        )


def _cut(tokens: SortedTokens, start: int, stop: int | None) -> SortedTokens:
    return SortedTokens(
        tokens.sequence_N[start:stop], tokens.ids_NLK[start:stop], tokens.is_decode_N[start:stop]
    )
