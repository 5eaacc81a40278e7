"""Whether experts can borrow from the KV cache, and a layout in which they can.

Target: ``WorkerBase.get_supported_kv_cache_layouts`` in vllm.v1.worker.worker_base. Reads the
    attention layers of the model that has just been built, and the finished ``VllmConfig``.
Versions: 0.32, 0.33.
Why: a run of blocks is one piece of memory only where the layers of a block lie together, and vLLM
    prefers layouts in which they do not. Blocks may come and go only where nobody else counts on
    all of them, and where orders go from vLLM's own scheduler to its own worker.
How: a worker whose experts borrow names only those layouts, of all that its attention backends
    support; the engine core takes the first. All workers build the same model, so they agree.
Can go: when vLLM's cache can be resized.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm_moe_offload.patches.wrapping import wrap

_WITHOUT_DRAFT_MODEL = ("ngram", "ngram_gpu", "suffix")


def apply(module: ModuleType) -> None:
    """Let workers whose experts borrow ask for a layout."""
    wrap(module.WorkerBase, "get_supported_kv_cache_layouts", _supported_layouts)


def _supported_layouts(original: Callable[..., list[str]], self: Any) -> list[str]:
    layouts = original(self)
    engines = getattr(self, "moe_offload_engines", [])
    if not (engines and engines[0].borrows):
        return layouts
    return [name for name in layouts if _is_block_outermost(name)]


def why_not_shared(vllm_config: Any) -> str | None:
    """Why experts cannot borrow from the KV cache of the model that has been built, if so."""
    return next((reason for reason in _reasons(vllm_config) if reason is not None), None)


def _reasons(vllm_config: Any) -> Any:
    """Reasons or None, one test after the other: later ones rely on earlier ones."""
    yield _why_not_by_features(vllm_config)
    yield _why_not_by_processes(vllm_config)
    yield _why_not_by_layers(vllm_config)
    yield _why_not_by_layout(vllm_config)


def _why_not_by_features(vllm_config: Any) -> str | None:
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    model = vllm_config.model_config
    features = {
        "a KV connector counts on all blocks": vllm_config.kv_transfer_config is not None,
        "pipeline stages hold different layers": parallel.pipeline_parallel_size > 1,
        "context parallelism spreads a sequence's blocks over GPUs": (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "a draft model has a cache of its own": (
            speculative is not None and speculative.method not in _WITHOUT_DRAFT_MODEL
        ),
        "a hybrid model keeps states beside keys and values": model.is_hybrid,
        "an encoder has a cache of its own": model.is_encoder_decoder,
        "HiSparse keeps a part of the cache on the host": (
            vllm_config.attention_config.hisparse_config is not None
        ),
        "the experts are shared out unevenly": _is_uneven(vllm_config),
    }
    return next((reason for reason, active in features.items() if active), None)


def _is_uneven(vllm_config: Any) -> bool:
    parallel = vllm_config.parallel_config
    size = parallel.tensor_parallel_size if parallel.enable_expert_parallel else 1
    return bool(vllm_config.model_config.get_num_experts() % size)


def _why_not_by_processes(vllm_config: Any) -> str | None:
    """Both halves have to be there: who schedules gives orders, every worker hears each of them."""
    from vllm import envs

    scheduler = vllm_config.scheduler_config.scheduler_cls
    if scheduler is not None and not _qualified_name(scheduler).startswith("vllm."):
        return f"the scheduler {_qualified_name(scheduler)} is not vLLM's (--scheduler-cls)"
    executor = vllm_config.parallel_config.distributed_executor_backend
    if executor == "external_launcher":
        return "every worker has a scheduler of its own, and all must decide alike"
    # vLLM 0.32's first one for Ray goes past the worker.
    is_first = executor == "ray" and not getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)
    if is_first or executor not in ("uni", "mp", "ray"):
        return f"the executor {_qualified_name(executor)} is not known to hand on orders"
    return None


def _qualified_name(name_or_class: Any) -> str:
    if isinstance(name_or_class, type):
        return f"{name_or_class.__module__}.{name_or_class.__qualname__}"
    return str(name_or_class)


def _why_not_by_layers(vllm_config: Any) -> str | None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    specs = [
        spec
        for layer in _attention_layers(vllm_config).values()
        if not getattr(layer, "kv_sharing_target_layer_name", None)
        and (spec := layer.get_kv_cache_spec(vllm_config)) is not None
    ]
    if not specs:
        return "the model has no KV cache"
    for spec in specs:
        # Not what inherits from them: sinks hold blocks of their own, others give some up early.
        if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
            return f"not all layers have full attention ({type(spec).__name__})"
        if spec.sliding_window is not None or spec.attention_chunk_size is not None:
            return "not all layers have full attention (sliding window)"
    if len({spec.page_size_bytes for spec in specs}) > 1:
        return "the layers' caches differ in size"
    return None


def _attention_layers(vllm_config: Any) -> dict[str, Any]:
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    return layers


def _why_not_by_layout(vllm_config: Any) -> str | None:
    from vllm import envs
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

    asked = vllm_config.cache_config.kv_cache_layout or envs.VLLM_KV_CACHE_LAYOUT
    if asked is not None and not _is_block_outermost(asked):
        return f"the layout {asked} was asked for (VLLM_KV_CACHE_LAYOUT)"
    backends = get_current_attn_backends(vllm_config)
    layouts = get_supported_kv_cache_layouts(backends)
    if not any(layout.is_block_outermost for layout in layouts):
        names = ", ".join(sorted({backend.get_name() for backend in backends}))
        return f"the attention backend {names} keeps the layers of a block apart"
    return None


def _is_block_outermost(name: str) -> bool:
    from vllm.config.cache import _layout_from_name

    return bool(_layout_from_name(name).is_block_outermost)
