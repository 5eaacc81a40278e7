"""MoE-Infinity's prediction (arXiv 2401.14361v3, PredictEAM) for the next layer.

A token's activations up to layer l are matched by cosine with the matrices of a bounded collection;
the guess for layer l + 1 is the share of each expert there. A matrix holds ``WINDOW`` tokens of one
sequence. A step's rows are counted on the device, each row of the batch as one sequence; every
``WINDOW`` steps a thread takes the matrices that are full enough into the collection, where a new
one replaces the most similar, and the device's copy follows.

Legend: T tokens, L layers, M tokens, K choices a token, E experts, N matrices, R rows of a batch.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_moe_offload.kernels.predict import EamTables
from vllm_moe_offload.predictors.collection import Collection
from vllm_moe_offload.predictors.figures import CAPACITY, WINDOW
from vllm_moe_offload.predictors.predictor import Arrays, checked

ROWS = 32
"""Sequences of a step that are learned from; a step of more tokens is not."""


class EamPredictor:
    """Learns activation matrices of sequences.

    Args:
        num_layers: L.
        num_experts: E, of every layer.
        max_tokens: M.
        device: where the layers are computed.
    """

    def __init__(
        self, num_layers: int, num_experts: int, max_tokens: int, device: torch.device
    ) -> None:
        shape = (num_layers, num_experts, CAPACITY)
        self.tables = EamTables(
            counts_LEN=torch.zeros(shape, dtype=torch.int16, device=device),
            inverse_norm_LN=torch.zeros(num_layers, CAPACITY, device=device),
            size=torch.zeros(1, dtype=torch.int32, device=device),
            product_MN=torch.zeros(max_tokens, CAPACITY, dtype=torch.int32, device=device),
        )
        self._collection = Collection(num_layers, num_experts)
        self._lock = threading.Lock()
        # The first place takes inactive ids, the last one the number of tokens.
        self._counts_RLE = torch.zeros(
            (ROWS, num_layers, num_experts + 2), dtype=torch.int32, device=device
        )
        self._copy_RLE = torch.zeros_like(
            self._counts_RLE, device="cpu", pin_memory=device.type == "cuda"
        )
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._has_copy = False
        self._steps = 0
        self._thread = ThreadPoolExecutor(1, "moe-offload-collection")
        self._added: Future[list[int]] | None = None

    def source(self, layer: int, x_TH: Tensor) -> EamTables:
        """The tables."""
        return self.tables

    def learn(self, ids_LTK: Tensor, num_tokens: int) -> None:
        """Count the rows of a step."""
        if num_tokens > ROWS:
            return
        ids_RLK = ids_LTK[:, :num_tokens].transpose(0, 1)
        ones = torch.ones_like(ids_RLK)
        counts_RLE = self._counts_RLE[:num_tokens]
        counts_RLE.scatter_add_(2, (ids_RLK + 1).long(), ones)
        is_token_RL = (ids_RLK >= 0).any(2)
        counts_RLE[..., -1] += is_token_RL

    def refresh(self) -> None:
        """Pass on what a window has counted, and fetch what has become of the one before."""
        self._steps += 1
        self._hand_over()
        if self._steps % WINDOW == 0 and not self._has_copy:
            self._copy_RLE.copy_(self._counts_RLE, non_blocking=True)
            self._counts_RLE.zero_()
            self._has_copy = True
            if self._copied is not None:
                self._copied.record()

    def settle(self) -> None:
        """Bring all complete windows into the tables; waits for the thread and the device."""
        while self._has_copy or self._added is not None:
            if self._added is not None:
                self._added.result()
            elif self._copied is not None:
                self._copied.synchronize()
            self._hand_over()

    def _hand_over(self) -> None:
        """Move the last window on, from the device to the thread or from there to the tables."""
        if self._added is not None and self._added.done():
            self._upload(self._added.result())
            self._added = None
        if self._has_copy and self._added is None and self._is_copied():
            self._has_copy = False
            self._added = self._thread.submit(self._add_rows, self._copy_RLE.numpy().copy())

    def add(self, counts_LE: NDArray[Any]) -> None:
        """Take in the matrix of a sequence [L, E]."""
        self._upload([self._add(counts_LE)])

    def forget(self) -> None:
        """Drop what is being counted, and the collection; see ``Predictor``."""
        self.settle()
        self._counts_RLE.zero_()
        layers, experts, _ = self.tables.counts_LEN.shape
        with self._lock:
            self._collection = Collection(layers, experts)
        self.tables.size.zero_()

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The collection."""
        with self._lock:
            counts_NLE = [self._collection.matrix(n).copy() for n in range(self._collection.size)]
        layers, experts, _ = self.tables.counts_LEN.shape
        stacked = np.array(counts_NLE, dtype=np.int16).reshape(-1, layers, experts)
        return {"counts_NLE": stacked}

    def from_arrays(self, arrays: Arrays) -> None:
        """Go on with a collection, see ``Predictor``."""
        layers, experts, _ = self.tables.counts_LEN.shape
        counts_NLE = checked(arrays, "counts_NLE", (None, layers, experts))
        for counts_LE in counts_NLE.clip(max=np.iinfo(np.int16).max):
            self.add(counts_LE)

    def _is_copied(self) -> bool:
        return self._copied is None or self._copied.query()

    def _add_rows(self, counts_RLE: NDArray[np.int32]) -> list[int]:
        full = counts_RLE[:, 0, -1] >= WINDOW // 2
        return [self._add(counts_LE) for counts_LE in counts_RLE[full, :, 1:-1]]

    def _add(self, counts_LE: NDArray[Any]) -> int:
        with self._lock:
            return self._collection.add(counts_LE.astype(np.float32))

    def _upload(self, places: list[int]) -> None:
        for place in places:
            counts_LE = torch.from_numpy(self._collection.matrix(place))
            norm_L = torch.from_numpy(self._collection.norm(place)).clamp(min=1e-9)
            self._put(counts_LE, self.tables.counts_LEN[:, :, place])
            self._put(1 / norm_L, self.tables.inverse_norm_LN[:, place])
        self.tables.size.fill_(self._collection.size)

    @staticmethod
    def _put(values: Tensor, target: Tensor) -> None:
        """Copy to the device without waiting for it."""
        values = values.to(target.dtype)
        if target.is_cuda:
            values = values.pin_memory().to(target.device, non_blocking=True)
        target.copy_(values)
