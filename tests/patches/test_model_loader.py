"""When memory is planned and taken, seen through a loader that loads nothing."""

from types import SimpleNamespace

import pytest
import torch

from vllm_moe_offload import engine as engine_module
from vllm_moe_offload import fill
from vllm_moe_offload.config import KEY
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.kernels.activation import Activation
from vllm_moe_offload.layer import building_engine
from vllm_moe_offload.layout import ExpertLayout
from vllm_moe_offload.memory import HostMemory
from vllm_moe_offload.offloaded_layer import LayerSpec
from vllm_moe_offload.patches import model_loader

MIB = 1 << 20
MODEL = torch.nn.Module()
LAYOUT = ExpertLayout.pack(
    [("w13_weight", (512, 512), torch.float32), ("w2_weight", (512, 512), torch.float32)]
)


def make_loader(num_layers: int = 2):
    """A patched loader; its models have layers of four experts."""

    class Loader:
        def load_model(self, vllm_config, model_config, prefix=""):
            self.model = self.create_model(vllm_config, model_config, prefix)
            self.engine = building_engine()
            if self.engine is not None:
                self.gaps = [fill.gaps(s.views()) for s in self.engine.pool.segments]
                self.ready = bool(self.engine._layers)
            return self.model

        def create_model(self, vllm_config, model_config, prefix=""):
            self.built_with = building_engine()
            for number in range(num_layers if self.built_with else 0):
                spec = LayerSpec(f"layer {number}", 4, LAYOUT, Activation("silu"))
                self.built_with.add_layer(spec)
            return MODEL

    model_loader.apply(SimpleNamespace(BaseModelLoader=Loader))
    return Loader()


@pytest.fixture(autouse=True)
def reason(monkeypatch):
    """Why the KV cache cannot be shared; None if it can."""
    answer = SimpleNamespace(reason="it is a test")
    monkeypatch.setattr(model_loader, "why_not_shared", lambda _config: answer.reason)
    return answer


def load(loader, options: dict | None, *, draft: bool = False):
    model_config = SimpleNamespace(architectures=["Qwen3MoeForCausalLM"])
    config = SimpleNamespace(
        model_config=SimpleNamespace() if draft else model_config,
        additional_config={} if options is None else {KEY: options},
        load_config=SimpleNamespace(device=None, load_format="auto"),
        device_config=SimpleNamespace(device="cpu"),
        parallel_config=SimpleNamespace(
            local_world_size=1, data_parallel_size_local=1, pipeline_parallel_size=1
        ),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=None, gpu_memory_utilization=0.9),
    )
    return loader.load_model(config, model_config)


def test_without_the_plugin():
    loader = make_loader()
    assert load(loader, None) is MODEL
    assert loader.built_with is None


def test_planned_before_and_finished_after_loading():
    loader = make_loader()
    assert load(loader, {"cache_fraction": 0.5}) is MODEL
    assert loader.built_with is loader.engine
    assert loader.engine.budget.slots == (2, 2)
    assert not loader.ready
    assert loader.engine._layers
    assert building_engine() is None


def test_every_expert_is_marked_before_loading():
    loader = make_loader()
    load(loader, {})
    assert [len(gaps) for gaps in loader.gaps] == [16, 16]


def test_no_memory_is_taken_before_the_plan_is_checked(monkeypatch):
    limit = HostMemory(20 * MIB, "the container's limit of 77 bytes")
    monkeypatch.setattr(engine_module, "available_host_memory", lambda: limit)
    loader = make_loader()
    with pytest.raises(OffloadError, match="host pool = "):
        load(loader, {"cache_fraction": 0})
    pool = loader.built_with.pool
    assert pool.num_bytes == 16 * MIB
    # Only memory that was never written is all zero: marks are not.
    assert not any(segment.rows_EB.any() for segment in pool.segments)
    assert building_engine() is None


def test_no_layer_to_offload():
    with pytest.raises(OffloadError) as error:
        load(make_loader(num_layers=0), {"layers": "3"})
    message = str(error.value)
    assert "layers = 3: " in message
    assert "Qwen3MoeForCausalLM" in message
    assert "Choose other layers" in message


def test_draft_model_without_experts_is_left_alone():
    loader = make_loader(num_layers=0)
    assert load(loader, {}, draft=True) is MODEL
    assert loader.built_with.budget is None
    assert not loader.built_with._layers


def test_draft_model_with_experts_has_an_engine_of_its_own():
    loader = make_loader()
    load(loader, {}, draft=True)
    assert loader.engine._layers


@pytest.mark.parametrize(
    ("options", "given", "borrows"),
    [
        ({}, None, True),
        ({}, "it is a test", False),
        ({"cache_fraction": 0.5}, None, False),
        ({"gpu_gb": 1}, None, False),
    ],
)
def test_who_borrows(reason, options, given, borrows):
    reason.reason = given
    loader = make_loader()
    load(loader, options)
    assert loader.engine.borrows == borrows
    assert (sum(loader.engine.budget.slots) == 0) == borrows
    assert loader.engine.not_shared == (given if not options else None)


def test_a_draft_model_does_not_borrow(reason):
    reason.reason = None
    loader = make_loader()
    load(loader, {}, draft=True)
    assert not loader.engine.borrows
    assert "draft" in loader.engine.not_shared


def test_dense_weights_are_those_outside_the_pool_and_counted_once():
    loader = make_loader()
    load(loader, {})
    rows_EB = loader.engine.pool.segments[1].rows_EB
    tied = torch.nn.Parameter(torch.zeros(10, 4))
    weights = [
        tied,
        torch.nn.Parameter(tied.data.view(4, 10)),
        torch.nn.Parameter(torch.zeros(3)),
        torch.nn.Parameter(rows_EB[:, 64:128].view(torch.float32)),
        torch.nn.Parameter(torch.zeros(99, device="meta")),
    ]
    found = model_loader._dense_bytes(torch.nn.ParameterList(weights), loader.engine)
    assert found == 4 * (40 + 3)
    assert loader.engine.dense_bytes == 0, "the model has no weights but those of its experts"


@pytest.mark.parametrize(
    ("kv_bytes", "share", "usable"),
    [(None, 0.9, 7000), (None, 0.8, 6500), (None, 0.5, 3500), (None, 0.1, 0),
     (6000, 0.9, 1000), (9000, 0.9, 0)],
)  # fmt: skip
def test_what_vllm_may_still_take_of_a_gpu(monkeypatch, kv_bytes, share, usable):
    """Of 10,000 bytes this process has 1500 for its dense weights, and another one as many."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7000, 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 1500)
    cache = SimpleNamespace(kv_cache_memory_bytes=kv_bytes, gpu_memory_utilization=share)
    assert model_loader._usable_bytes(cache, torch.device("cuda")) == usable
    assert model_loader._usable_bytes(cache, torch.device("cpu")) is None


def test_it_reaches_the_plan(monkeypatch):
    monkeypatch.setattr(model_loader, "_usable_bytes", lambda *_: 0)
    loader = make_loader()
    load(loader, {})
    assert loader.engine.budget.slots == (0, 0)


def test_it_is_what_the_plan_is_checked_by(monkeypatch):
    """Not what is free at the moment, which the KV cache is going to take."""
    checked = []
    monkeypatch.setattr(engine_module.OffloadEngine, "_check", lambda *args: checked.append(args))
    monkeypatch.setattr(model_loader, "_usable_bytes", lambda *_: 123)
    load(make_loader(), {"cache_fraction": 0.5})
    assert checked[0][-1] == 123


def test_a_draft_model_gets_the_rest_of_the_slots(monkeypatch):
    loader, others = make_loader(), []
    monkeypatch.setattr(model_loader, "engines_of_loading_worker", lambda: others)
    options = {"gpu_gb": 5 * 2 * 2 * MIB / (1 << 30)}
    load(loader, options)
    assert [engine.budget.slots for engine in others] == [(4, 4)]
    load(loader, options, draft=True)
    assert [engine.budget.slots for engine in others] == [(4, 4), (1, 1)]


@pytest.mark.parametrize("engines", [0, 1, 2])
def test_all_workers_of_the_host_share_its_memory(engines):
    parallel = SimpleNamespace(local_world_size=4, data_parallel_size_local=engines)
    assert model_loader._workers_on_host(parallel) == 4 * max(1, engines)


@pytest.mark.parametrize(
    ("stage", "layers", "left_alone"),
    [((0, 2), "2-3", True), ((2, 4), "0-1", True), ((0, 2), "all", True), ((2, 4), "all", False)],
)
def test_stage_without_a_layer_to_offload(stage, layers, left_alone):
    """The first ones may be dense; where the last one is, there is no fused-MoE layer at all."""
    model = SimpleNamespace(
        architectures=["Qwen3MoeForCausalLM"],
        get_layers_start_end_indices=lambda _: stage,
        get_total_num_hidden_layers=lambda: 4,
    )
    config = SimpleNamespace(
        model_config=model, parallel_config=SimpleNamespace(pipeline_parallel_size=2)
    )
    options = model_loader.MoeOffloadConfig.parse({"layers": layers})
    assert model_loader._is_stage_of_others(config, options) == left_alone
