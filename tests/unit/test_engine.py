"""The engine against dense experts, bit for bit, and what it counts.

Legend: T tokens, K choices a token, E experts, H hidden size, I intermediate size.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_offload import engine as engine_module
from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.engine_report import cost_of_unpinned, describe
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.operations import TORCH, operations_for
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.memory import HostMemory
from vllm_moe_offload.offloaded_layer import LayerSpec

HOST = torch.device("cpu")
MIB = 1 << 20
POISON = 0xFF
"""Bytes of this value are NaN in every floating-point type."""

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def silu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.gelu(gate) * up


def clamped_silu(h):
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)


def swiglu_of_gpt_oss(h):
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1.0)


ACTIVATIONS = {
    Activation("silu"): silu,
    Activation("gelu"): gelu,
    Activation("silu", limit=0.5): clamped_silu,
    Activation("swigluoai"): swiglu_of_gpt_oss,
    Activation("relu2_no_mul"): lambda h: F.relu(h) * F.relu(h),
    Activation("silu_no_mul"): F.silu,
}


@dataclass(frozen=True)
class Shape:
    """One MoE layer to be made."""

    experts: int
    hidden: int
    intermediate: int
    dtype: torch.dtype
    activation: Activation
    biases: bool
    weight_on_input: bool


class DenseLayer:
    """All experts of a layer as ordinary tensors, and the plainest way to run them."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        columns = shape.intermediate * (2 if shape.activation.is_gated else 1)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(shape.experts, *size, generator=generator).to(shape.dtype)

        self.tensors = {
            "w13_weight": random(columns, shape.hidden),
            "w2_weight": random(shape.hidden, shape.intermediate),
        }
        if shape.biases:
            self.tensors |= {"w13_bias": random(columns), "w2_bias": random(shape.hidden)}

    def spec(self, name: str) -> LayerSpec:
        layout = ExpertLayout.pack((n, tuple(t.shape[1:]), t.dtype)
                                   for n, t in self.tensors.items())  # fmt: skip
        shape = self.shape
        return LayerSpec(name, shape.experts, layout, shape.activation, shape.weight_on_input)

    def run(self, x_TH, weight_TK, ids_TK):
        on_input = self.shape.weight_on_input
        rows_TKH = torch.zeros(*ids_TK.shape, self.shape.hidden, dtype=x_TH.dtype)
        for expert in range(self.shape.experts):
            chosen_TK = ids_TK == expert
            if not chosen_TK.any():
                continue
            t, k = chosen_TK.nonzero(as_tuple=True)
            weight = weight_TK[t, k].unsqueeze(1)
            x = (x_TH[t].float() * weight).to(x_TH.dtype) if on_input else x_TH[t]
            y = self._expert(expert, x)
            rows_TKH[t, k] = y if on_input else (y.float() * weight).to(y.dtype)
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        for k in range(ids_TK.shape[1]):
            y_TH += rows_TKH[:, k].float()
        return y_TH.to(x_TH.dtype)

    def _expert(self, expert, x):
        # A matrix product may round otherwise where memory is not aligned, so each tensor is
        # taken out of the stack.
        w13, w2, b13, b2 = (
            self.tensors[name][expert].clone() if name in self.tensors else None
            for name in ("w13_weight", "w2_weight", "w13_bias", "w2_bias")
        )
        h = F.linear(x, w13, b13)
        h = ACTIVATIONS[self.shape.activation](h.float()).to(h.dtype)
        return F.linear(h, w2, b2)


def make_engine(layers: list[DenseLayer], **options) -> OffloadEngine:
    """An engine whose memory is poisoned wherever nothing has been loaded."""
    engine = OffloadEngine(MoeOffloadConfig.parse(options), HOST)
    for number, layer in enumerate(layers):
        index, segment = engine.add_layer(layer.spec(f"layer {number}"))
        assert index == number
        segment.rows_EB.fill_(POISON)
        for name, view in segment.views().items():
            view.copy_(layer.tensors[name])
    engine.plan()
    engine.finish_loading()
    engine.arena.buffer.fill_(POISON)
    for block in engine.staging.blocks:
        block.fill_(POISON)
    return engine


@pytest.fixture(autouse=True, scope="module")
def poison_fresh_tensors():
    """Let torch.empty give NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_engines_run_the_specification_here():
    assert operations_for(HOST) is TORCH


def shapes(**fixed):
    fields = {
        "experts": st.integers(1, 6),
        "hidden": st.integers(1, 24),
        "intermediate": st.integers(1, 16),
        "dtype": st.sampled_from(DTYPES),
        "activation": st.sampled_from(list(ACTIVATIONS)),
        "biases": st.booleans(),
        "weight_on_input": st.booleans(),
    }
    return st.builds(Shape, **fields | {name: st.just(value) for name, value in fixed.items()})


@st.composite
def cases(draw):
    """Layers, the options of an engine, and steps of (layer, seed of the input, ids)."""
    layers = [
        DenseLayer(shape, seed) for seed, shape in enumerate(draw(st.lists(shapes(), min_size=1,
                                                                           max_size=3)))
    ]  # fmt: skip
    most = draw(st.sampled_from([layer.shape.experts for layer in layers]))
    row = max(layer.spec("").layout.row_bytes for layer in layers)
    staging_rows = draw(st.integers(1, 7))
    options = {
        "cache_fraction": draw(st.integers(0, most)) / most,
        "staging_mb": 2 * staging_rows * row / MIB,
    }
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        number = draw(st.integers(0, len(layers) - 1))
        experts, choices = layers[number].shape.experts, draw(st.integers(1, 4))
        tokens = draw(st.sampled_from([0, 1, 1, 2, 3, 5, 8, 100]))
        if tokens == 100:
            generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
            ids = torch.randint(-1, experts, (tokens, choices), generator=generator).tolist()
        else:
            choice = st.lists(st.integers(-1, experts - 1), min_size=choices, max_size=choices)
            ids = draw(st.lists(choice, min_size=tokens, max_size=tokens))
        dtype = draw(st.sampled_from([torch.int32, torch.int64]))
        steps.append((number, torch.tensor(ids, dtype=dtype).view(tokens, choices)))
    return layers, options, steps


def inputs(layer: DenseLayer, ids_TK: torch.Tensor, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(ids_TK.shape[0], layer.shape.hidden, generator=generator)
    weight_TK = torch.rand(ids_TK.shape, generator=generator)
    return x_TH.to(layer.shape.dtype), weight_TK


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@settings(max_examples=150)
@given(cases())
def test_any_routing_gives_the_bits_of_dense_experts(case):
    layers, options, steps = case
    engine = make_engine(layers, **options)
    for seed, (number, ids_TK) in enumerate(steps):
        x_TH, weight_TK = inputs(layers[number], ids_TK, seed)
        y_TH = engine.run(number, x_TH, weight_TK, ids_TK)
        assert y_TH.dtype == x_TH.dtype
        assert same_bits(y_TH, layers[number].run(x_TH, weight_TK, ids_TK))
        engine.check_integrity()
    engine.close()


@settings(max_examples=100)
@given(cases())
def test_counts(case):
    layers, options, steps = case
    engine = make_engine(layers, **options)
    active = moved = 0
    for number, ids_TK in steps:
        before = engine.stats()
        engine.run(number, *inputs(layers[number], ids_TK), ids_TK)
        after = engine.stats()
        distinct = set(ids_TK.flatten().tolist()) - {-1}
        misses = after.misses - before.misses
        assert after.active - before.active == len(distinct)
        assert after.hits + after.misses == after.active
        assert after.streamed <= after.misses
        active += len(distinct)
        moved += misses * engine.specs[number].layout.row_bytes
        assert (after.active, after.bytes_moved) == (active, moved)
        residencies = [engine.residency(n) for n in range(len(layers))]
        capacity = engine.budget.slots
        assert all(r.num_resident() <= c for r, c in zip(residencies, capacity, strict=True))
        assert after.resident == sum(r.num_resident() for r in residencies)
    total = engine.stats()
    assert total.slots == sum(engine.budget.slots)
    assert total.experts_in_pool == sum(layer.shape.experts for layer in layers)
    assert (total.pool_bytes, total.slot_bytes) == (
        engine.budget.pool_bytes, engine.budget.slot_bytes,
    )  # fmt: skip
    assert total.hit_ratio == (total.hits / active if active else 0)


def example_layer(experts: int = 8, **fields) -> DenseLayer:
    defaults = {
        "hidden": 16, "intermediate": 8, "dtype": torch.float32,
        "activation": Activation("silu"), "biases": True, "weight_on_input": False,
    }  # fmt: skip
    return DenseLayer(Shape(experts, **defaults | fields), seed=experts)


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_inactive_ids_cost_nothing(share):
    layer = example_layer()
    engine = make_engine([layer], cache_fraction=share)
    ids_TK = torch.full((5, 2), -1)
    y_TH = engine.run(0, *inputs(layer, ids_TK), ids_TK)
    assert same_bits(y_TH, torch.zeros(5, 16))
    stats = engine.stats()
    assert (stats.active, stats.misses, stats.bytes_moved, stats.resident) == (0, 0, 0, 0)
    assert bool((engine.arena.buffer == POISON).all())
    assert all(bool((block == POISON).all()) for block in engine.staging.blocks)


@pytest.mark.parametrize("tokens", [5, 90], ids=["step", "sweep"])
def test_rows_of_padding_are_as_if_they_had_chosen_nothing(tokens):
    layer = example_layer()
    padded, plain = (make_engine([layer], cache_fraction=0.5) for _ in range(2))
    is_padding_T = torch.arange(tokens) >= 2
    ids_TK = torch.arange(2 * tokens).view(tokens, 2) % 8
    left_TK = ids_TK.masked_fill(is_padding_T[:, None], -1)
    x_TH, weight_TK = inputs(layer, ids_TK)
    y_TH = padded.run(0, x_TH, weight_TK, ids_TK, is_padding_T=is_padding_T)
    assert same_bits(y_TH, plain.run(0, x_TH, weight_TK, left_TK))
    # What a row takes is measured.
    counted, expected = (
        replace(e.stats(), transfer_seconds=0, stall_seconds=0) for e in (padded, plain)
    )
    assert counted == expected
    assert counted.active == 4


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_an_expert_that_nobody_chose_is_never_read(share):
    layer = example_layer()
    layer.tensors["w13_weight"][7] = torch.nan
    layer.tensors["w2_bias"][7] = torch.nan
    engine = make_engine([layer], cache_fraction=share)
    for step in range(6):
        ids_TK = torch.arange(step, step + 6).view(3, 2) % 7
        y_TH = engine.run(0, *inputs(layer, ids_TK), ids_TK)
        assert not y_TH.isnan().any()


def test_residents_are_hits():
    layer = example_layer()
    engine = make_engine([layer], cache_fraction=0.5)
    for ids in ([[0, 1]], [[1, 2]], [[0, 3]], [[0, 1]]):
        engine.run(0, *inputs(layer, torch.tensor(ids)), torch.tensor(ids))
    stats = engine.stats()
    assert (stats.active, stats.hits, stats.misses, stats.streamed) == (8, 4, 4, 0)
    assert stats.bytes_moved == 4 * engine.specs[0].layout.row_bytes
    assert stats.hit_ratio == 0.5


def test_a_sweep_leaves_residents_alone():
    layer = example_layer(experts=4)
    engine = make_engine([layer], cache_fraction=0.5)

    def residents_after(ids_TK):
        engine.run(0, *inputs(layer, ids_TK), ids_TK)
        return engine.residency(0).tables.expert_of_S.tolist()

    assert residents_after(torch.tensor([[0, 2]])) == [0, 2]
    others_TK = torch.tensor([[1, 3]]).repeat(32, 1)
    assert residents_after(others_TK) == [0, 2]
    assert engine.stats().streamed == 2
    assert residents_after(others_TK[:31]) == [1, 3]
    assert engine.stats().streamed == 2


def test_a_sweep_fills_empty_slots():
    layer = example_layer(experts=4)
    engine = make_engine([layer], cache_fraction=0.5)
    ids_TK = torch.tensor([[1, 3]]).repeat(32, 1)
    engine.run(0, *inputs(layer, ids_TK), ids_TK)
    assert engine.residency(0).tables.expert_of_S.tolist() == [1, 3]


@pytest.mark.parametrize("staging_rows", [1, 2, 3, 8])
def test_nothing_is_kept_without_slots(staging_rows):
    layer = example_layer()
    row = layer.spec("").layout.row_bytes
    engine = make_engine([layer], cache_fraction=0, staging_mb=2 * staging_rows * row / MIB)
    ids_TK = torch.arange(8).view(4, 2)
    for _ in range(2):
        x_TH, weight_TK = inputs(layer, ids_TK)
        y_TH = engine.run(0, x_TH, weight_TK, ids_TK)
        assert same_bits(y_TH, layer.run(x_TH, weight_TK, ids_TK))
    stats = engine.stats()
    assert (stats.hits, stats.streamed, stats.resident, stats.slots) == (0, 16, 0, 0)


def test_reset_of_statistics_keeps_residents():
    layer = example_layer()
    engine = make_engine([layer], cache_fraction=1)
    ids_TK = torch.tensor([[0, 5]])
    engine.run(0, *inputs(layer, ids_TK), ids_TK)
    engine.reset_stats()
    assert (engine.stats().active, engine.stats().resident) == (0, 2)
    engine.run(0, *inputs(layer, ids_TK), ids_TK)
    assert (engine.stats().hits, engine.stats().misses) == (2, 0)


def routed_to(step: int) -> torch.Tensor:
    """Two hot experts, and others that come by once."""
    return torch.tensor([[step % 2, 2 + step % 10]])


def run_steps(engine: OffloadEngine, layers: list[DenseLayer], steps: range) -> list[torch.Tensor]:
    outputs = []
    for step in steps:
        ids_TK = routed_to(step)
        for number, layer in enumerate(layers):
            outputs.append(engine.run(number, *inputs(layer, ids_TK, step), ids_TK))
        engine.check_integrity()
    return outputs


def test_the_adaptive_policy_keeps_hot_experts():
    layers = [example_layer(12), example_layer(12)]
    ours, lru = (make_engine(layers, cache_fraction=0.25, policy=p) for p in ("adaptive", "lru"))
    steps = range(200)
    outputs = zip(run_steps(ours, layers, steps), run_steps(lru, layers, steps), strict=True)
    assert all(same_bits(*pair) for pair in outputs)
    assert ours.stats().active == lru.stats().active
    assert ours.stats().hits > 1.3 * lru.stats().hits


def test_routing_is_forgotten_but_residents_stay():
    layers = [example_layer(12), example_layer(12)]
    engine, fresh = (make_engine(layers, cache_fraction=0.25) for _ in range(2))
    run_steps(engine, layers, range(50))
    resident = engine.residency(0).tables.expert_of_S.clone()
    engine.forget_routing()
    assert engine.stats().active > 0
    assert torch.equal(engine.residency(0).tables.expert_of_S, resident)
    for name, table in vars(fresh._eviction.tables).items():
        if name != "slot_of_LE":
            assert torch.equal(getattr(engine._eviction.tables, name), table), name


def test_the_policy_learns_once_a_step_and_not_from_sweeps(monkeypatch):
    layers = [example_layer(12), example_layer(12)]
    engine = make_engine(layers, cache_fraction=0.25)
    learned = []
    monkeypatch.setattr(engine._eviction, "_learn", learned.append)
    run_steps(engine, layers, range(3))
    assert len(learned) == 3
    many_TK = torch.arange(12).repeat(16)[:, None]
    for number, layer in enumerate(layers):
        engine.run(number, *inputs(layer, many_TK), many_TK)
    assert len(learned) == 3


@pytest.mark.parametrize(("share", "policy"), [(0, "adaptive"), (1, "adaptive"), (0.5, "lru")])
def test_no_policy_where_lru_is_asked_for_or_nobody_is_evicted(share, policy):
    layers = [example_layer(12)]
    engine = make_engine(layers, cache_fraction=share, policy=policy)
    assert engine._eviction is None
    run_steps(engine, layers, range(20))


def test_statistics_of_two_engines_add_up():
    layer = example_layer()
    engines = [make_engine([layer], cache_fraction=share) for share in (0, 1)]
    ids_TK = torch.tensor([[0, 5], [5, 6]])
    for engine in engines:
        engine.run(0, *inputs(layer, ids_TK), ids_TK)
    one, other = (engine.stats().as_dict() for engine in engines)
    total = (engines[0].stats() + engines[1].stats()).as_dict()
    assert total == {name: one[name] + other[name] for name in one}
    assert (total["active"], total["streamed"]) == (6, 3)


def test_integrity_notices_a_spoilt_slot():
    layer = example_layer()
    engine = make_engine([layer], cache_fraction=0.5)
    ids_TK = torch.tensor([[3, 5]])
    engine.run(0, *inputs(layer, ids_TK), ids_TK)
    engine.check_integrity()
    engine.slot_rows(0)[1, 7] += 1
    with pytest.raises(AssertionError, match="layer 0"):
        engine.check_integrity()


def test_finishing_twice_keeps_residents():
    layer = example_layer()
    engine = make_engine([layer], cache_fraction=1)
    ids_TK = torch.tensor([[3, 5]])
    engine.run(0, *inputs(layer, ids_TK), ids_TK)
    engine.finish_loading()
    assert engine.residency(0).num_resident() == 2


def test_no_layer_joins_after_the_plan():
    layer = example_layer()
    engine = make_engine([layer], cache_fraction=1)
    with pytest.raises(AssertionError, match="before the budget is planned"):
        engine.add_layer(layer.spec("late"))


def test_one_line_about_an_engine():
    layers = [example_layer(8), example_layer(4, dtype=torch.bfloat16)]
    engine = make_engine(layers, cache_fraction=0.5, staging_mb=1)
    assert describe(engine.specs, engine.budget, "cpu") == (
        "moe-offload: 2 MoE layers of 4 to 8 experts, 48 KiB in the host pool, "
        "2 to 4 slots a layer taking 24 KiB of cpu memory, 1 MiB of staging"
    )


def refused_plan(monkeypatch, available: int, **options) -> str:
    memory = HostMemory(available, "the container's limit of 77 bytes")
    monkeypatch.setattr(engine_module, "available_host_memory", lambda: memory)
    engine = OffloadEngine(MoeOffloadConfig.parse(options), HOST)
    layout = ExpertLayout.pack([("w13_weight", (MIB,), torch.uint8)])
    for name in ("a", "b"):
        engine.add_layer(LayerSpec(name, 1024, layout, Activation("silu")))
    with pytest.raises(OffloadError) as error:
        engine.plan()
    assert not hasattr(engine, "arena"), "slots were allocated in spite of the refusal"
    return str(error.value)


def test_slots_and_staging_larger_than_the_device(monkeypatch):
    message = refused_plan(monkeypatch, 1 << 30, gpu_gb=1, staging_mb=64)
    assert "gpu_gb = 1.0: " in message
    assert "slots (1 GiB) and staging (64 MiB) need 1.06 GiB" in message
    assert "the container's limit of 77 bytes has 1 GiB free" in message
    assert "Lower gpu_gb, cache_fraction or staging_mb" in message


def test_pool_larger_than_the_host(monkeypatch):
    message = refused_plan(monkeypatch, 2 << 30, cache_fraction=0, staging_mb=64)
    assert "host pool = 2 GiB: " in message
    assert "need 2.06 GiB of host memory" in message
    assert "the container's limit of 77 bytes leaves 2 GiB" in message
    assert "raise the container's limit" in message


def test_staging_too_small_for_two_experts(monkeypatch):
    message = refused_plan(monkeypatch, 1 << 40, staging_mb=1.5)
    assert "staging_mb = 1.5: " in message
    assert "two experts of 1 MiB each" in message
    assert "Give at least 2, or auto" in message


def test_layer_that_cannot_be_pinned_computes_the_same(monkeypatch):
    """Its rows come from where the device holds them."""
    layers = [example_layer(8), example_layer(6)]
    statuses = iter([0, 2])
    fake = SimpleNamespace(
        cudaHostRegister=lambda *_: next(statuses), cudaHostUnregister=lambda _: 0
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 1 << 30))
    finish_loading = OffloadEngine.finish_loading

    def finish_as_on_a_gpu(engine):
        assert engine.pool.register(HOST) == engine.pool.segments[1].num_bytes
        finish_loading(engine)

    monkeypatch.setattr(OffloadEngine, "finish_loading", finish_as_on_a_gpu)
    engine = make_engine(layers, cache_fraction=0.25)
    # Nobody reads the rows that were not pinned.
    engine.pool.segments[1].rows_EB.fill_(POISON)
    for seed, tokens in enumerate((3, 80, 5)):
        for number, layer in enumerate(layers):
            ids_TK = torch.randint(layer.shape.experts, (tokens, 2))
            x_TH, weight_TK = inputs(layer, ids_TK, seed)
            y_TH = engine.run(number, x_TH, weight_TK, ids_TK)
            assert same_bits(y_TH, layer.run(x_TH, weight_TK, ids_TK))
    # Copies within the device are no traffic.
    pinned, held = engine.layer_counts()
    assert held.misses > 0
    assert held.demand_bytes == held.wave_bytes == held.transfer_seconds == 0
    assert engine.stats().bytes_moved == pinned.demand_bytes + pinned.wave_bytes > 0
    assert pinned.transfer_seconds > 0
    engine.close()


@pytest.mark.parametrize("fraction", [0, 0.5])
def test_time_of_transfers_is_counted_with_and_without_slots(fraction):
    layer = example_layer()
    engine = make_engine([layer], cache_fraction=fraction)
    ids_TK = torch.tensor([[0, 1], [2, 3]])
    engine.run(0, *inputs(layer, ids_TK), ids_TK)
    stats = engine.stats()
    assert stats.stall_seconds == stats.transfer_seconds > 0, "nothing was fetched ahead"


def test_cost_of_memory_that_cannot_be_pinned():
    said = cost_of_unpinned(3 << 30, 8 << 30)
    assert "refused to pin 3 GiB of the host pool's 8 GiB" in said
    assert "less to the KV cache" in said
    assert "memlock" in said
