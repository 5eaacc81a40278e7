"""No step launches what the rehearsal has not: Triton's own keys of launches, for many steps.

Legend: T tokens, K choices a token, E experts, L layers, H hidden size, I intermediate size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import launches
import pytest
import torch
from formats_of_tests import FORMATS, layout_of

from vllm_moe_offload.config import MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.kernels.expert_mlp import TileConfig
from vllm_moe_offload.kernels.formats import ExpertFormat
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.offloaded_layer import LayerSpec, Routing
from vllm_moe_offload.rehearsal import Inputs, representatives
from vllm_moe_offload.sweep import Sweep

HAS_GPU = torch.cuda.is_available()
H, I, L = 128, 128, 5  # noqa: E741

KEYS_OF_TABLE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536)


@dataclass(frozen=True)
class Case:
    """An engine, and what its layers are given."""

    experts: int = 128
    top_k: int = 8
    share: float = 0.5
    predictor: str = "none"
    policy: str = "adaptive"
    form: ExpertFormat | None = None
    dtype: torch.dtype = torch.bfloat16
    hidden: int = H
    most: int = 2100
    log_tokens: int = 0
    pads: bool = False
    tiles: Callable[[int], TileConfig] | None = None


def nearest(tokens: int) -> TileConfig:
    """Tiles as vLLM's tuned tables give them: those of the nearest entry."""
    entry = min(KEYS_OF_TABLE, key=lambda key: abs(key - tokens))
    place = KEYS_OF_TABLE.index(entry)
    return TileConfig(16 << (place % 4), 32 << (place % 3), 32 << (place % 2), 1, 4, 2 + place % 3)


CASES = {
    "half resident": Case(),
    "nothing resident": Case(share=0),
    "all resident": Case(share=1),
    "few experts": Case(experts=6, top_k=2),
    "least recently used": Case(policy="lru"),
    "float32": Case(dtype=torch.float32),
    "tuned tiles": Case(tiles=nearest),
    "padding and a log": Case(experts=60, top_k=4, pads=True, log_tokens=2101),
    "gate": Case(predictor="gate"),
    "markov": Case(predictor="markov", experts=60, top_k=4),
    "eam": Case(predictor="eam", experts=60, top_k=4),
    **{
        name: Case(form=FORMATS[name], experts=16, top_k=2, most=700)
        for name in ("fp8 block", "fp8 channel", "fp8 tensor", "int4 group 32, zeros", "mxfp4")
    },
}


@contextmanager
def engine_of(case: Case, device: torch.device) -> Iterator[OffloadEngine]:
    """An engine that sweeps, on the host too."""
    if case.form is None:
        shapes = (("w13_weight", (2 * I, case.hidden)), ("w2_weight", (case.hidden, I)))
        layout = ExpertLayout.pack([(name, shape, case.dtype) for name, shape in shapes])
    else:
        layout = layout_of(case.form, 2 * I, case.hidden, I, None)
    options = {
        "cache_fraction": case.share, "predictor": case.predictor, "policy": case.policy,
        "staging_mb": 4 * layout.row_bytes / 2**20,
    }  # fmt: skip
    engine = OffloadEngine(MoeOffloadConfig.parse(options), device, log_tokens=case.log_tokens)
    routing = Routing(case.experts, case.top_k, tuple(range(case.experts)))
    for number in range(L):
        spec = LayerSpec(
            f"layer {number}", case.experts, layout, Activation("silu"), routing=routing,
            tiles=case.tiles, format=case.form,
        )  # fmt: skip
        engine.add_layer(spec)[1].rows_EB.zero_()
    engine.routers = [lambda x_TH: x_TH.new_zeros(len(x_TH), case.experts)] * L
    engine.plan()
    engine.finish_loading()
    if not HAS_GPU and engine.staging.num_bytes:
        rows = [segment.rows_EB for segment in engine.pool.segments]
        engine._sweep = Sweep(engine._layers, rows, device)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(autouse=True)
def nothing_is_captured(monkeypatch):
    if not HAS_GPU:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def inputs_of(case: Case, tokens: int, device: torch.device) -> Inputs:
    ids_TK = torch.arange(case.top_k, dtype=torch.int32, device=device).expand(tokens, -1)
    return Inputs(
        torch.zeros(tokens, case.hidden, dtype=case.dtype, device=device),
        torch.ones(tokens, case.top_k, device=device),
        ids_TK.contiguous(),
        ids_TK.clone(),
        torch.zeros(tokens, dtype=torch.bool, device=device) if case.pads else None,
    )


def profile(engine: OffloadEngine, case: Case, device: torch.device) -> None:
    """The step of most tokens, which every start of vLLM runs."""
    step(engine, case, case.most, device)


def step(engine: OffloadEngine, case: Case, tokens: int, device: torch.device) -> None:
    inputs = inputs_of(case, tokens, device)
    for number in range(L):
        engine.run(number, *inputs.tensors)


def rehearse(engine: OffloadEngine) -> None:
    """What ``OffloadEngine.rehearse`` does on a GPU, anywhere."""
    rehearsal, engine.rehearsal.is_over = engine.rehearsal, True
    rehearsal.perform(engine._layers, engine._sweep, engine.run, lambda _: None)


def edges(most: int) -> list[int]:
    """Tokens around all powers of two and three times as many, and all small ones."""
    around = {k << n for n in range(12) for k in (1, 3)}
    near = {tokens + d for tokens in around for d in (-1, 0, 1)}
    return sorted(tokens for tokens in near | set(range(1, 20)) if 1 <= tokens <= most)


def not_rehearsed(case: Case, tokens: Iterable[int], device: torch.device) -> dict[int, set]:
    with engine_of(case, device) as engine, launches.recorded() as keys:
        for part in engine._layers:
            # Launches are not made, so no list is filled: let there be waves of streams.
            part.residency.work.num_streams.fill_(case.experts)
        profile(engine, case, device)
        keys.clear()
        rehearse(engine)
        rehearsed = set(keys)
        assert rehearsed
        missing = {}
        for count in tokens:
            keys.clear()
            step(engine, case, count, device)
            if new := keys - rehearsed:
                missing[count] = {key[0] for key in new}
    return missing


@pytest.mark.parametrize("name", CASES)
def test_steps_launch_what_was_rehearsed(name, device):
    case = CASES[name]
    assert not_rehearsed(case, edges(case.most), device) == {}


def test_every_number_of_tokens(device):
    case = replace(CASES["tuned tiles"], predictor="markov", experts=32, top_k=4, most=600)
    assert not_rehearsed(case, range(1, case.most + 1), device) == {}


@pytest.mark.parametrize("predictor", ["none", "markov", "gate"])
@pytest.mark.parametrize("experts", [6, 60])
def test_one_build_serves_the_layers_between_the_first_and_the_last(predictor, experts, device):
    case = Case(experts=experts, top_k=4, predictor=predictor, pads=True, log_tokens=1001)
    with engine_of(case, device) as engine, launches.recorded() as keys:
        for tokens in (1, 9, 300):
            inputs = inputs_of(case, tokens, device)
            of_layers = []
            for number in range(1, L - 1):
                keys.clear()
                engine.run(number, *inputs.tensors)
                of_layers.append(set(keys))
            assert all(of_layer == of_layers[0] for of_layer in of_layers), tokens


SMALL = Case(experts=4, top_k=2, hidden=32, dtype=torch.float32, most=33, predictor="markov")


def random_inputs(seed: int, tokens: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, SMALL.experts, generator=generator)
    ids_TK = scores.topk(SMALL.top_k).indices.int().to(device)
    x_TH = torch.randn(tokens, SMALL.hidden, generator=generator)
    weight_TK = torch.rand(tokens, SMALL.top_k, generator=generator)
    return Inputs(x_TH.to(device), weight_TK.to(device), ids_TK, None, None)


def some_steps(engine: OffloadEngine, device: torch.device, *counts: int) -> list[torch.Tensor]:
    results = []
    for seed, tokens in enumerate(counts):
        inputs = random_inputs(seed, tokens, device)
        results += [engine.run(number, *inputs.tensors) for number in range(L)]
    return results


def state_of(engine: OffloadEngine) -> dict[str, torch.Tensor]:
    """Whatever a step may change, but the clocks and what is forgotten after warm-up."""
    state = {}
    for number in range(L):
        residency = engine.residency(number)
        state[f"slots {number}"] = residency.tables.slot_of_E
        state[f"experts {number}"] = residency.tables.expert_of_S
        state[f"stamps {number}"] = residency.tables.stamp_S
        state[f"counters {number}"] = residency.work.counters
        state[f"rows {number}"] = engine.slot_rows(number)
    for field in fields(engine.eviction.tables):
        if field.name not in ("use_LE", "figures_LN"):  # written anew by every step
            state[field.name] = getattr(engine.eviction.tables, field.name)
    return {name: tensor.clone() for name, tensor in state.items()}


def test_nothing_is_left_of_a_rehearsal(device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the torch forms change the same
    with engine_of(SMALL, device) as engine, engine_of(SMALL, device) as other:
        for number, segment in enumerate(engine.pool.segments):
            generator = torch.Generator().manual_seed(number)
            for name, view in segment.views().items():
                view.copy_(torch.randn(view.shape, generator=generator) * 0.1)
                other.pool.segments[number].views()[name].copy_(view)
        for each in (engine, other):
            some_steps(each, device, SMALL.most, 1)
        before = state_of(engine)
        rehearse(engine)
        after = state_of(engine)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        engine.check_integrity()
        for each in (engine, other):
            each.forget_routing()
        counts = (2, SMALL.most, 1)
        results, expected = (some_steps(each, device, *counts) for each in (engine, other))
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        engine.check_integrity()


def test_a_host_rehearses_nothing(monkeypatch):
    with engine_of(SMALL, torch.device("cpu")) as engine:
        rehearsal = engine.rehearsal
        monkeypatch.setattr(rehearsal, "perform", lambda *_: pytest.fail("a host compiles nothing"))
        engine.rehearse()
        assert rehearsal.is_over, "layers are watched to no end"


def test_another_engine_knows_what_there_is_to_rehearse(device):
    with engine_of(SMALL, device) as engine:
        profile(engine, SMALL, device)
        rehearse(engine)
        other = engine.rehearsal.again()
        assert not other.is_over
        steps = [
            [(step.layer, step.tokens) for step in each.steps(engine._layers)]
            for each in (engine.rehearsal, other)
        ]
        assert steps[0] == steps[1] != []


def test_representatives_are_the_first_of_their_kind():
    assert representatives(12, lambda tokens: tokens // 4) == [1, 4, 8, 12]
    assert representatives(6, lambda tokens: tokens % 3) == [1, 2, 3]
    assert representatives(1, lambda _: 0) == [1]


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles, or reads from its cache, inside."""
    from triton import knobs

    names: list[str] = []
    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = lambda *_, **event: names.append(event["fn"].name)
    try:
        yield names
    finally:
        knobs.runtime.jit_post_compile_hook = before


ON_GPU = {
    "16 bit": Case(hidden=192),
    "all resident": Case(hidden=320, share=1),
    "nothing resident": Case(hidden=448, share=0),
    "padding, a log and a predictor": Case(
        experts=60, top_k=4, hidden=576, pads=True, log_tokens=2101, predictor="eam"
    ),
    "markov": Case(hidden=704, predictor="markov"),
    "tuned tiles": Case(hidden=832, tiles=nearest),
    "fp8": Case(hidden=1024, form=FORMATS["fp8 block"], experts=16, top_k=2),
    "mxfp4": Case(hidden=1152, form=FORMATS["mxfp4"], experts=16, top_k=2),
}
"""Of sizes that no other test has, as what is compiled once in a process is not compiled again."""


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="only for a GPU something is compiled")
@pytest.mark.parametrize("name", ON_GPU)
def test_nothing_is_compiled_after_a_rehearsal(name, device):
    case, said = ON_GPU[name], []
    with engine_of(case, device) as engine:
        profile(engine, case, device)
        engine._say = said.append
        with compilations() as ahead:
            engine.rehearse()
        assert len(ahead) > 5, "there was nothing to compile"
        with compilations() as late:
            for tokens in edges(case.most):
                step(engine, case, tokens, device)
            torch.cuda.synchronize()
        assert late == []
    print(name, len(ahead), said)
