"""A bounded collection of expert activation matrices, and the most similar one to a token.

MoE-Infinity (arXiv 2401.14361v3): an activation matrix counts per layer and expert how
often the tokens of one sequence were routed there; a partial matrix of the current token is
compared by cosine with those of past sequences; a full collection replaces its most similar.

Legend: N matrices, T tokens, L layers, K choices a token, E experts.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.predictors.figures import CAPACITY

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


class Collection:
    """Activation matrices of past sequences.

    Args:
        num_layers: L.
        num_experts: E.
        capacity: matrices to keep at most.
    """

    def __init__(self, num_layers: int, num_experts: int, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.size = 0
        # The matrices are the last axis, so that one expert's counts in all of them are a row.
        self._counts_LEN = np.zeros((num_layers, num_experts, capacity), dtype=np.float32)
        # The same as shares of their layer, with the experts last: those of a match are a row.
        self._share_LNE = np.zeros((num_layers, capacity, num_experts), dtype=np.float32)
        # In double precision, as equal similarities are to be equal: the first matrix wins then.
        self._norm_LN = np.zeros((num_layers, capacity))
        self._layers = np.arange(num_layers)

    def matrix(self, index: int) -> Floats:
        """One stored matrix [L, E]."""
        return self._counts_LEN[:, :, index]

    def norm(self, index: int) -> Floats:
        """One stored matrix's norm up to and with each layer, float64 [L]."""
        return self._norm_LN[:, index]

    def add(self, counts_LE: Floats) -> int:
        """Store a sequence's matrix, in place of the most similar one if there is no room.

        Returns:
            Where it is now.
        """
        place = self.size if self.size < self.capacity else self._most_similar(counts_LE)
        self._counts_LEN[:, :, place] = counts_LE
        self._share_LNE[:, place] = counts_LE / np.maximum(counts_LE.sum(-1, keepdims=True), 1)
        # Up to and with each layer, since a token is matched on the layers it has passed.
        squares_L = np.square(counts_LE, dtype=np.float64).sum(-1)
        self._norm_LN[:, place] = np.sqrt(np.cumsum(squares_L))
        self.size = max(self.size, place + 1)
        return place

    def match(self, ids_TLK: Ints) -> Ints:
        """Find for every token and layer the stored matrix most similar up to that layer.

        Returns:
            int64 [T, L], indices of matrices; entry l depends on the layers 0 to l only.
        """
        assert self.size, "nothing to compare with"
        found_TLKN = self._counts_LEN[self._layers[:, None], ids_TLK, : self.size]
        product_TLN = found_TLKN.sum(2).cumsum(1)
        norm_LN = np.maximum(self._norm_LN[:, : self.size], 1e-9)
        best: Ints = (product_TLN / norm_LN).argmax(-1)
        return best

    def rows(self, matrix_TL: Ints, first_layer: int) -> Floats:
        """Share of each expert in one layer of the matched matrices.

        Args:
            matrix_TL: for the layers from ``first_layer`` on, which matrix to look into.
            first_layer: layer of the first column.

        Returns:
            float32 [T, columns, E]; a row sums to one, or to zero where nothing was counted.
        """
        layers = self._layers[first_layer : first_layer + matrix_TL.shape[1]]
        shares: Floats = self._share_LNE[layers, matrix_TL]
        return shares

    def _most_similar(self, counts_LE: Floats) -> int:
        product_N = np.tensordot(counts_LE, self._counts_LEN, axes=2)
        return int((product_N / np.maximum(self._norm_LN[-1], 1e-9)).argmax())


class SequenceCounts:
    """Activation matrices of the sequences that are running.

    Args:
        num_layers: L.
        num_experts: E.
        window: tokens after which a matrix is handed over although its sequence goes on; None
            for whole sequences.
    """

    def __init__(self, num_layers: int, num_experts: int, window: int | None = None) -> None:
        self._shape = (num_layers, num_experts)
        self._window = window
        self._first_L1 = np.arange(num_layers)[:, None] * num_experts
        self._counts: dict[int, Floats] = {}
        self._tokens: dict[int, int] = {}

    def count(self, sequence: int, ids_LK: Ints) -> Floats | None:
        """Count one token; returns the matrix [L, E] if its window is full."""
        if sequence not in self._counts:
            self._counts[sequence] = np.zeros(self._shape, dtype=np.float32)
            self._tokens[sequence] = 0
        self._counts[sequence].reshape(-1)[self._first_L1 + ids_LK] += 1
        self._tokens[sequence] += 1
        return self.finish(sequence) if self._tokens[sequence] == self._window else None

    def finish(self, sequence: int) -> Floats | None:
        """Take a sequence's matrix [L, E] out, None if no token is counted."""
        self._tokens.pop(sequence, None)
        return self._counts.pop(sequence, None)
