"""The orders that the adaptive policy chooses from: what each step teaches, and the ranks.

They depend on what was routed alone, so one set serves caches of all sizes, and a block of steps
is computed at once: with one step at a time numpy would spend more on its calls than on the work.

Legend: S steps of a block, F time constants, M candidates, L layers, E experts, R experts that
one layer reads.
"""

import numpy as np
from numpy.typing import NDArray

from vllm_moe_offload.kernels.candidates import (
    CANDIDATES,
    EXPERT_BITS,
    FADES,
    FAINT,
    FIRST,
    GAINS,
    LRU,
    MAX_AGE,
    MIXTURES,
    SEQUEL,
    SEQUEL_MIXTURE,
    SEQUEL_SCALE,
    SEQUEL_SHIFT,
    SEQUEL_UNIT,
    SOON,
)
from vllm_moe_offload.simulate.cache import Bools, Ints
from vllm_moe_offload.simulate.steps import Block, Step, steps_of_block

Ranks = NDArray[np.int32]
_Averages = NDArray[np.float32]

_EPOCH = np.int32(2 * MAX_AGE)
"""Number of the first step where uses are noted, so that 0 is long ago."""


class Orders:
    """Ranks the experts of each layer by every candidate, as ``kernels.learn`` does.

    Args:
        num_layers: L.
        num_experts: E.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape = (num_layers, num_experts)
        most = steps_of_block(num_layers, num_experts)
        # As whole planes, with which numpy works in one go.
        expert_LE = np.zeros(shape, dtype=np.int32) + np.arange(num_experts, dtype=np.int32)
        self._lowest_LE = expert_LE - np.int32(FIRST)
        self._used_LE = np.zeros(shape, dtype=np.int32)
        self._uses = _Uses(num_layers, num_experts)
        self._sequels = _Sequels(num_layers, num_experts)
        # What a block begins with, and what each of its steps leaves.
        self._rank_SMLE = np.empty((most + 1, CANDIDATES, *shape), dtype=np.int32)
        self._rank_SMLE[0] = self._lowest_LE
        self._steps = 0

    def before(self, step: Step) -> Ranks:
        """Ranks [M, L, E] before a step: the engine's less ``FIRST``, so all are below 0.

        Every step must be asked for, one after the other; the next block overwrites them.
        """
        if step.place == 0:
            self._rank_SMLE[0] = self._rank_SMLE[self._steps]
            self._steps = len(step.block.active_SLE)
            self._rank(step.block, step.number, self._rank_SMLE[1 : self._steps + 1])
        return self._rank_SMLE[step.place]

    def _rank(self, block: Block, number: int, out_SMLE: Ranks) -> None:
        """Rank after each step of a block."""
        self._recency(block.active_SLE, number, out_SMLE[:, LRU])
        score_SMLE = out_SMLE.view(np.float32)
        average_SFLE = self._uses.averages(block.active_SLE)
        for candidate, mixture in enumerate(MIXTURES, start=LRU + 1):
            _mix(average_SFLE, mixture, score_SMLE[:, candidate])
        mixed_SLE = score_SMLE[:, LRU + 1 + MIXTURES.index(SEQUEL_MIXTURE)]
        self._expect(block, mixed_SLE, score_SMLE[:, SEQUEL])
        # The bits of floats from 0 up order as the floats do.
        by_score_SMLE = out_SMLE[:, LRU + 1 :]
        by_score_SMLE &= np.int32(-(1 << EXPERT_BITS))
        by_score_SMLE += self._lowest_LE

    def _recency(self, active_SLE: Bools, number: int, out_SLE: Ranks) -> None:
        step_S11 = np.arange(number, number + len(active_SLE), dtype=np.int32)[:, None, None]
        used_SLE = np.multiply(active_SLE, step_S11 + _EPOCH, dtype=np.int32)
        last_LE = self._used_LE
        for used_LE in used_SLE:
            last_LE = np.maximum(used_LE, last_LE, out=used_LE)
        self._used_LE = last_LE.copy()
        used_SLE += MAX_AGE - _EPOCH - step_S11
        np.maximum(used_SLE, 0, out=used_SLE)
        used_SLE <<= EXPERT_BITS
        np.add(used_SLE, self._lowest_LE, out=out_SLE)

    def _expect(self, block: Block, mixed_SLE: _Averages, out_SLE: _Averages) -> None:
        """Score by the sequels of a step's experts, and by a mixture for each of them."""
        expected_SLE = (mixed_SLE * np.float32(SEQUEL_UNIT)).astype(np.int32)
        expected_SLE *= block.reads_SL[..., None].astype(np.int32)
        self._sequels.add_expected(block, expected_SLE)
        np.multiply(expected_SLE, np.float32(SEQUEL_SCALE), out=out_SLE, dtype=np.float32)


def _mix(average_SFLE: _Averages, mixture: tuple[float, ...], out_SLE: _Averages) -> None:
    """Add the weighted averages up in their order."""
    (first, weight), *others = ((f, np.float32(w)) for f, w in enumerate(mixture) if w)
    np.multiply(average_SFLE[:, first], weight, out=out_SLE)
    for number, weight in others:
        out_SLE += average_SFLE[:, number] * weight


class _Uses:
    """The averages of each expert's use."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        shape, most = (num_layers, num_experts), steps_of_block(num_layers, num_experts)
        self._fade_F11, self._gain_F11 = (
            np.array(factors, dtype=np.float32).reshape(-1, 1, 1) for factors in (FADES, GAINS)
        )
        self._average_SFLE = np.empty((most, len(FADES), *shape), dtype=np.float32)
        self._last_FLE = np.zeros((len(FADES), *shape), dtype=np.float32)
        # What an average may not fade below: nothing as long as the expert was never used.
        self._least_LE = np.zeros(shape, dtype=np.float32)

    def averages(self, active_SLE: Bools) -> _Averages:
        """Averages [S, F, L, E] after each step of a block, until the next one."""
        average_SFLE = self._average_SFLE[: len(active_SLE)]
        before_FLE, gained_FLE = self._last_FLE, np.empty_like(self._last_FLE)
        uses_SLE = active_SLE.astype(np.float32)
        for after_FLE, uses_LE in zip(average_SFLE, uses_SLE, strict=True):
            np.multiply(before_FLE, self._fade_F11, out=after_FLE)
            np.maximum(after_FLE, self._least_LE, out=after_FLE)
            np.multiply(uses_LE, self._gain_F11, out=gained_FLE)
            before_FLE = np.add(after_FLE, gained_FLE, out=after_FLE)
        self._last_FLE[:] = before_FLE
        # The block's own uses are far above the least throughout it.
        np.maximum(self._least_LE, active_SLE.any(0) * np.float32(FAINT), out=self._least_LE)
        return average_SFLE


class _Sequels:
    """Knows for each pair of a layer's experts how often one is used soon after the other."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._nobody = num_layers * num_experts
        # A row more, for layers that read fewer experts than another one. All values fit 15 bits.
        self._sequel_AE = np.zeros((self._nobody + 1, num_experts), dtype=np.int16)
        self._earlier: list[Ints] = []
        self._use_SLE = np.zeros((len(SOON) - 1, num_layers, num_experts), dtype=np.int16)

    def add_expected(self, block: Block, expected_SLE: Ranks) -> None:
        """Add after each step how much its experts expect of each other one soon."""
        pairs = [*self._earlier, *self._pairs(block)]
        self._earlier = pairs[-SOON[-1] :]
        use_SLE = np.concatenate([self._use_SLE, block.active_SLE * np.int16(SEQUEL_UNIT)])
        self._use_SLE = use_SLE[1 - len(SOON) :]
        steps = len(expected_SLE)
        uses_SLE = sum(use_SLE[n : n + steps] for n in range(len(SOON)))
        for place, expected_LE in enumerate(expected_SLE):
            now = len(pairs) - steps + place
            if now >= SOON[-1]:
                self._learn(pairs[now - SOON[-1]], uses_SLE[place])
            asked_RLE = self._sequel_AE.take(pairs[now], axis=0)
            asked_LE = np.add.reduce(asked_RLE, axis=0, dtype=np.int32)
            np.add(expected_LE, asked_LE, out=expected_LE)

    def _learn(self, pair_RL: Ints, uses_LE: NDArray[np.int16]) -> None:
        """Move what is known of some experts' sequels towards the uses in the last steps."""
        sequel_RLE = self._sequel_AE.take(pair_RL, axis=0)
        change_RLE = uses_LE - sequel_RLE
        change_RLE >>= SEQUEL_SHIFT
        sequel_RLE += change_RLE
        self._sequel_AE[pair_RL] = sequel_RLE
        self._sequel_AE[self._nobody] = 0

    def _pairs(self, block: Block) -> Ints:
        """The pairs that each step reads, [S, R, L], filled up with nobody."""
        reads_SL1 = block.reads_SL[..., None]
        is_pair_SLR = np.arange(reads_SL1.max()) < reads_SL1
        pair_SLR = np.full(is_pair_SLR.shape, self._nobody)
        pair_SLR[is_pair_SLR] = block.pair_A
        return np.ascontiguousarray(pair_SLR.transpose(0, 2, 1))
