"""A step whose copies go on beside it: the same bits, however late the copies are.

On the host copies are made when they are queued, which is as early as they may be. Here they are
made when somebody waits for them, which is as late.

Legend: T tokens, K choices a token, E experts.
"""

from collections import deque
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload import assembly
from vllm_moe_offload.beside import Beside
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.operations import TORCH
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec
from vllm_moe_offload.step import FEW_PAIRS, MAX_PARTS, num_parts, wave_starts

E, H, I = 12, 8, 4  # noqa: E741


class Late(Beside):
    """Copies that are made when they are waited for."""

    def __init__(self) -> None:
        self.forks = self.made = 0
        self._queued: deque = deque()
        self._marked = 0
        self._inside = False

    def gather(self, *arguments, **options):
        if self._inside:
            self._queued.append((arguments, options))
        else:
            TORCH.gather(*arguments, **options)

    def fork(self) -> None:
        self.forks += 1

    @contextmanager
    def copies(self):
        self._inside = True
        yield
        self._inside = False

    def mark(self):
        return self.made + len(self._queued)

    def wait(self, mark) -> None:
        while self.made < mark:
            arguments, options = self._queued.popleft()
            TORCH.gather(*arguments, **options)
            self.made += 1

    def join(self) -> None:
        self.wait(self.made + len(self._queued))


def build(slots: int, staging_rows: int, monkeypatch, late: Late | None = None) -> OffloadEngine:
    operations = TORCH if late is None else replace(TORCH, gather=late.gather)
    monkeypatch.setattr(assembly, "operations_for", lambda _device: operations)
    if late is not None:
        monkeypatch.setattr(assembly, "beside_on", lambda _device: late)
    layout = ExpertLayout.pack(
        [("w13_weight", (2 * I, H), torch.float32), ("w2_weight", (H, I), torch.float32)]
    )
    options = {
        "cache_fraction": slots / E, "staging_mb": 2 * staging_rows * layout.row_bytes / 2**20,
    }  # fmt: skip
    engine = OffloadEngine(MoeOffloadConfig.parse(options), torch.device("cpu"))
    for number in range(2):
        engine.add_layer(LayerSpec(str(number), E, layout, Activation("silu")))
    engine.plan()
    generator = torch.Generator().manual_seed(0)
    for segment in engine.pool.segments:
        for view in segment.views().values():
            view.normal_(generator=generator)
    engine.finish_loading()
    monkeypatch.undo()
    engine.arena.buffer.fill_(255)  # NaN in every slot
    engine.staging.buffer.fill_(255)
    return engine


def inputs(tokens: int, top_k: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(-1, E, (tokens, top_k), generator=generator)
    return (
        torch.randn(tokens, H, generator=generator),
        torch.rand(tokens, top_k, generator=generator),
        ids_TK,
    )


@settings(max_examples=60)
@given(
    slots=st.integers(0, E), staging_rows=st.integers(1, 4), seed=st.integers(0, 99),
    tokens=st.lists(st.sampled_from((1, 5, 9, 20, 60)), min_size=1, max_size=4),
)  # fmt: skip
def test_late_copies_give_the_same_bits(slots, staging_rows, seed, tokens):
    with pytest.MonkeyPatch.context() as patch:
        late = Late()
        beside = build(slots, staging_rows, patch, late)
        in_turn = build(slots, staging_rows, patch)
        for step, count in enumerate(tokens):
            for layer in range(2):
                tensors = inputs(count, 3, 10 * seed + step)
                y_TH = beside.run(layer, *tensors)
                assert torch.equal(y_TH, in_turn.run(layer, *tensors))
                assert not late._queued, "a step ends with copies that nobody waits for"
        # What a row takes is measured.
        counted, expected = (
            replace(e.stats(), transfer_seconds=0, stall_seconds=0) for e in (beside, in_turn)
        )
        assert counted == expected
        beside.check_integrity()
        if 0 < slots < E and any(3 * count > FEW_PAIRS for count in tokens):
            assert late.made > 0


def test_what_is_at_hand_is_computed_before_anything_has_come(monkeypatch):
    late = Late()
    engine = build(6, 2, monkeypatch, late)
    layer = engine._layers[0]
    engine.run(0, *inputs(9, 3, 1))
    order = []
    plain = TORCH.expert_mlp

    def watched(x_TH, weight_TK, ids_TK, row_of_E, *rest, **options):
        order.append((late.made, int((row_of_E >= 0).sum())))
        plain(x_TH, weight_TK, ids_TK, row_of_E, *rest, **options)

    object.__setattr__(layer, "operations", replace(layer.operations, expert_mlp=watched))
    late.made = 0
    engine.run(0, *inputs(9, 3, 2))
    work = layer.residency.work
    assert [made for made, _ in order][: 1 + MAX_PARTS] == [0, 1, 2]
    assert sum(count for _, count in order[1 : 1 + MAX_PARTS]) == int(work.num_loads)


@pytest.mark.parametrize(
    ("slots", "pairs", "parts"),
    [
        (6, FEW_PAIRS, 0),
        (6, FEW_PAIRS + 1, MAX_PARTS),
        (E, 99, 0),
        (0, 99, 0),
        (1, 99, MAX_PARTS),
    ],
)
def test_when_loads_come_in_parts(slots, pairs, parts, monkeypatch):
    assert num_parts(build(slots, 2, monkeypatch)._layers[0], pairs) == parts


def test_how_many_waves(monkeypatch):
    layer = build(6, 2, monkeypatch)._layers[0]
    layer.residency.work.num_streams.fill_(5)
    assert list(wave_starts(layer, 9, evict=True)) == [0, 2, 4]
    # What is bounded by shapes does not ask how many there are.
    assert list(wave_starts(layer, 6, evict=True)) == []
    layer = build(E, 2, monkeypatch)._layers[0]
    assert list(wave_starts(layer, 99, evict=False)) == []


def test_waves_count_on_no_slot_that_may_close(monkeypatch):
    engine = build(6, 2, monkeypatch)
    layer = engine._layers[0]
    layer.residency.work.num_streams.fill_(E)
    monkeypatch.setattr("torch.Tensor.device", torch.device("meta"))  # the bound of a graph
    assert wave_starts(layer, 8, evict=True) == range(0, 2, 2)
    layer.residency.least_open = 1
    assert wave_starts(layer, 8, evict=True) == range(0, 7, 2)
    assert wave_starts(layer, 99, evict=False) == range(0, E - 1, 2)
