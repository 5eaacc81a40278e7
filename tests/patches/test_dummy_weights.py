"""Which random weights are drawn, and which are copied."""

from types import SimpleNamespace

import pytest
import torch

from vllm_moe_offload import layer
from vllm_moe_offload.patches import dummy_weights
from vllm_moe_offload.pool import HostPool


class Module(SimpleNamespace):
    """vLLM's module: ``load_weights`` initialises a list of tensors, each with its options."""


@pytest.fixture
def module():
    drawn = []

    def initialize_single_dummy_weight(param, low=-1.0, high=1.0, name=""):
        drawn.append(param)
        param.uniform_(low, high, generator=torch.Generator().manual_seed(1))

    class DummyModelLoader:
        def load_weights(self, weights):
            for weight, options in weights:
                module.initialize_single_dummy_weight(weight, **options)
            if not weights:
                raise ValueError("nothing to load")

    module = Module(
        DummyModelLoader=DummyModelLoader,
        initialize_single_dummy_weight=initialize_single_dummy_weight,
        drawn=drawn,
    )
    dummy_weights.apply(module)
    return module


@pytest.fixture
def rows(monkeypatch):
    """Rows of three layers in the pool of the engine that is being built."""
    rows = [torch.zeros(2, 64) for _ in range(3)]
    pool = HostPool()
    pool.segments = [SimpleNamespace(rows_EB=row) for row in rows]
    engine = SimpleNamespace(specs=[1, 2, 3], pool=pool)
    monkeypatch.setattr(layer, "building_engine", lambda: engine)
    return rows


def drawn(module, *weights, **options):
    """Positions of the weights that were drawn instead of copied."""
    module.drawn.clear()
    module.DummyModelLoader().load_weights([(w, options) for w in weights])
    return [i for i, w in enumerate(weights) if any(w is other for other in module.drawn)]


def test_layers_that_are_alike_are_drawn_once(module, rows):
    alike = [row[:, :32].view(2, 4, 8) for row in rows]
    other = rows[2][:, 32:].view(2, 8, 4)
    assert drawn(module, *alike, other, name="w13_weight") == [0, 3]
    expected = torch.empty(2, 4, 8)
    expected.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    for weight in alike:
        assert torch.equal(weight, expected)
    assert other.count_nonzero() == other.numel()


def test_what_is_drawn_otherwise_is_not_copied(module, rows):
    module.drawn.clear()
    half = [row[:, :32] for row in rows]
    half[1].dummy_weight_value = 3.0
    names = [{"name": "scale"}, {"name": "scale"}, {"name": "weight", "low": 0.0}]
    module.DummyModelLoader().load_weights(list(zip(half, names, strict=True)))
    assert [id(w) for w in module.drawn] == [id(w) for w in half]
    assert half[2].min() >= 0


def test_weights_outside_the_pool_and_shared_ones_are_drawn(module, rows):
    outside = [torch.zeros(2, 64), torch.zeros(2, 64)]
    assert drawn(module, *outside, rows[0], rows[0]) == [0, 1, 2, 3]


def test_without_an_engine_all_are_drawn(module, monkeypatch, rows):
    monkeypatch.setattr(layer, "building_engine", lambda: None)
    assert drawn(module, *rows) == [0, 1, 2]
    monkeypatch.setattr(layer, "building_engine", lambda: SimpleNamespace(specs=[]))
    assert drawn(module, *rows) == [0, 1, 2]


def test_nothing_is_remembered_after_a_failure(module, rows):
    with pytest.raises(ValueError, match="nothing to load"):
        drawn(module)
    module.drawn.clear()
    for row in rows:
        module.initialize_single_dummy_weight(row)
    assert len(module.drawn) == 3
