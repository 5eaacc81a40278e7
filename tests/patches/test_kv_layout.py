"""Whether a KV cache can be shared, and which layout is asked for."""

from types import SimpleNamespace

import pytest

from vllm_moe_offload.patches import kv_layout


def config(**changes):
    parallel = {
        "pipeline_parallel_size": 1, "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1, "tensor_parallel_size": 1,
        "enable_expert_parallel": False, "distributed_executor_backend": "uni",
    }  # fmt: skip
    model = {"is_hybrid": False, "is_encoder_decoder": False, "get_num_experts": lambda: 8}
    scheduler, attention = {"scheduler_cls": None}, {"hisparse_config": None}
    made = {"speculative_config": None, "kv_transfer_config": None}
    for name, value in changes.items():
        group = next(g for g in (parallel, model, scheduler, attention, made) if name in g)
        group[name] = value
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel), model_config=SimpleNamespace(**model),
        scheduler_config=SimpleNamespace(**scheduler),
        attention_config=SimpleNamespace(**attention), **made,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_transfer_config": "nixl"}, "connector"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "draft model"),
        ({"is_hybrid": True}, "hybrid"),
        ({"is_encoder_decoder": True}, "encoder"),
        ({"hisparse_config": "given"}, "HiSparse"),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 3}, "unevenly"),
    ],
)
def test_features_that_count_on_all_blocks(changes, reason):
    assert reason in kv_layout.why_not_shared(config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tensor_parallel_size": 3},
        {"enable_expert_parallel": True, "tensor_parallel_size": 4},
        {"speculative_config": SimpleNamespace(method="ngram")},
    ],
)
def test_features_that_do_not(changes):
    assert kv_layout._why_not_by_features(config(**changes)) is None


class Foreign:
    """Of no class that orders are known to pass."""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scheduler_cls": "my.Scheduler"}, "my.Scheduler is not vLLM's"),
        ({"scheduler_cls": Foreign}, "Foreign is not vLLM's"),
        ({"distributed_executor_backend": "external_launcher"}, "decide alike"),
        ({"distributed_executor_backend": Foreign}, "Foreign is not known"),
        ({"distributed_executor_backend": "my.Executor"}, "my.Executor is not known"),
    ],
)
def test_processes_that_orders_do_not_pass(changes, reason):
    """They would leave blocks with two tenants, and nobody would notice."""
    assert reason in kv_layout.why_not_shared(config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler"},
        {"distributed_executor_backend": "mp"},
        {"distributed_executor_backend": "ray"},
    ],
)
def test_processes_that_they_do(changes):
    assert kv_layout._why_not_by_processes(config(**changes)) is None


def test_the_first_executor_for_ray_goes_past_the_worker(monkeypatch):
    monkeypatch.setattr("vllm.envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND", False, raising=False)
    assert "ray is not known" in kv_layout._why_not_by_processes(
        config(distributed_executor_backend="ray")
    )


def layers(monkeypatch, *specs, **more):
    found = {
        str(n): SimpleNamespace(get_kv_cache_spec=lambda _config, spec=spec: spec, **more)
        for n, spec in enumerate(specs)
    }
    monkeypatch.setattr(kv_layout, "_attention_layers", lambda _config: found)
    return kv_layout._why_not_by_layers(None)


def full(**options):
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    return FullAttentionSpec(**sizes | options)


def test_layers_with_full_attention(monkeypatch):
    assert layers(monkeypatch, full(), full(), None) is None


def test_layers_that_keep_less_or_something_else(monkeypatch):
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    window = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64
    )

    class SinkSpec(type(full())):
        """As those of vLLM that inherit from full attention and do more."""

    assert "SlidingWindowSpec" in layers(monkeypatch, full(), window)
    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    assert "SinkSpec" in layers(monkeypatch, full(), SinkSpec(**sizes))
    assert "sliding window" in layers(monkeypatch, full(sliding_window=64))
    assert "differ in size" in layers(monkeypatch, full(), full(num_kv_heads=4))
    assert "no KV cache" in layers(monkeypatch, None)
    assert "no KV cache" in layers(monkeypatch, full(), kv_sharing_target_layer_name="0")


@pytest.fixture
def backends(monkeypatch):
    """Lets a test say which layouts the attention backends support."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    def support(*names: str):
        layouts = [KVCacheLayout[name] for name in names]
        monkeypatch.setattr(
            "vllm.v1.attention.backends.utils.get_supported_kv_cache_layouts", lambda _: layouts
        )
        backend = SimpleNamespace(get_name=lambda: "SOME_ATTN")
        monkeypatch.setattr(
            "vllm.distributed.kv_transfer.kv_connector.utils.get_current_attn_backends",
            lambda _config: [backend],
        )

    return support


def cache(layout=None):
    return SimpleNamespace(cache_config=SimpleNamespace(kv_cache_layout=layout))


def test_backends_that_keep_layers_apart(backends):
    backends("LBNHC", "LBHNC")
    assert "SOME_ATTN keeps" in kv_layout._why_not_by_layout(cache())
    backends("LBNHC", "BLHNC")
    assert kv_layout._why_not_by_layout(cache()) is None


def test_another_layout_was_asked_for(backends, monkeypatch):
    backends("LBNHC", "BLNHC")
    assert "LBNHC was asked for" in kv_layout._why_not_by_layout(cache("LBNHC"))
    assert kv_layout._why_not_by_layout(cache("BLNHC")) is None
    monkeypatch.setattr("vllm.envs.VLLM_KV_CACHE_LAYOUT", "NHD", raising=False)
    assert "NHD was asked for" in kv_layout._why_not_by_layout(cache())


def test_a_worker_whose_experts_borrow_names_layouts_for_them():
    class WorkerBase:
        def get_supported_kv_cache_layouts(self):
            return ["LBNHC", "LBHNC", "BLNHC", "BLHNC"]

    kv_layout.apply(SimpleNamespace(WorkerBase=WorkerBase))
    worker = WorkerBase()
    everything = worker.get_supported_kv_cache_layouts()
    assert len(everything) == 4
    for borrows, expected in ((False, everything), (True, ["BLNHC", "BLHNC"])):
        worker.moe_offload_engines = [SimpleNamespace(borrows=borrows)]
        assert worker.get_supported_kv_cache_layouts() == expected
