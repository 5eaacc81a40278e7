"""One engine a loaded model, planned before its weights come.

Target: ``BaseModelLoader.load_model`` and ``.create_model`` in
    vllm.model_executor.model_loader.base_loader.
Versions: 0.32, 0.33.
Why: slots can be sized once all layers are known, and must be refused before weights load.
How: an engine is at hand while the model is built; it is planned when the model stands and
    finished when the weights are in.
Can go: when vLLM has hooks around building and loading a model.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_moe_offload import fill
from vllm_moe_offload.config import KEY, MoeOffloadConfig
from vllm_moe_offload.engine import OffloadEngine
from vllm_moe_offload.engine_report import describe
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.patches.graph_ends import spans_layers
from vllm_moe_offload.patches.kv_layout import why_not_shared
from vllm_moe_offload.patches.recording import tokens_to_log
from vllm_moe_offload.patches.routers import find_routers
from vllm_moe_offload.patches.worker import engines_of_loading_worker
from vllm_moe_offload.patches.wrapping import wrap

logger = init_logger("vllm.moe_offload")


def apply(module: ModuleType) -> None:
    """Give every offloaded model its engine."""
    wrap(module.BaseModelLoader, "load_model", _load_model)
    wrap(module.BaseModelLoader, "create_model", _create_model)


def _load_model(
    original: Callable[..., Any], self: Any, vllm_config: Any, model_config: Any, prefix: str = ""
) -> Any:
    options = vllm_config.additional_config.get(KEY)
    if options is None:
        return original(self, vllm_config, model_config, prefix)
    # Its imports may be incomplete when we are applied.
    from vllm_moe_offload.layer import building

    device = vllm_config.load_config.device or vllm_config.device_config.device
    config = MoeOffloadConfig.parse(options)
    engine = OffloadEngine(
        config,
        torch.device(device),
        workers_on_host=vllm_config.parallel_config.local_world_size,
        spans_layers=spans_layers,
        say=partial(logger.info, "moe-offload: %s"),
        log_tokens=tokens_to_log(vllm_config, model_config, config),
    )
    with building(engine):
        model = original(self, vllm_config, model_config, prefix)
    if engine.specs:
        engine.finish_loading()
        engines_of_loading_worker().append(engine)
    return model


def _choose_memory(engine: OffloadEngine, vllm_config: Any, *, is_served: bool) -> None:
    """Let the slots be borrowed from the KV cache if nobody said otherwise and it can be shared."""
    if not engine.config.wants_to_borrow:
        return
    engine.not_shared = why_not_shared(vllm_config) if is_served else "it is that of a draft model"
    engine.borrows = engine.not_shared is None
    if not engine.borrows:
        engine.spare_bytes = _spare_bytes(vllm_config.cache_config, engine.device)
        logger.info(
            "moe-offload: the KV cache is not shared with experts, because %s. The split is made "
            "now: a quarter of the experts is held in slots, or as many as half of the memory that "
            "is left holds; gpu_gb gives another size.",
            engine.not_shared,
        )


def _spare_bytes(cache_config: Any, device: torch.device) -> int | None:
    """Half of what vLLM may still take of a GPU; the rest is for the KV cache and for steps.

    The dense weights have their memory by now.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    asked = cache_config.kv_cache_memory_bytes
    kept = asked if asked else int((1 - cache_config.gpu_memory_utilization) * total)
    return max(0, free - kept) // 2


def _dense_bytes(model: torch.nn.Module, engine: OffloadEngine) -> int:
    """Bytes of the weights outside the pool; known now, since kernels may put them elsewhere."""
    pool = {segment.rows_EB.untyped_storage().data_ptr() for segment in engine.pool.segments}
    sizes = {
        weight.data_ptr(): weight.nbytes  # some layers share theirs
        for weight in model.parameters()
        if weight.device.type == engine.device.type
        and weight.untyped_storage().data_ptr() not in pool
    }
    return sum(sizes.values())


def _create_model(
    original: Callable[..., Any], self: Any, vllm_config: Any, model_config: Any, prefix: str = ""
) -> Any:
    from vllm_moe_offload.layer import building_engine

    model = original(self, vllm_config, model_config, prefix)
    engine = building_engine()
    if engine is None:
        return model
    if not engine.specs and model_config is not vllm_config.model_config:
        return model  # a draft model for speculative decoding may be dense
    if not engine.specs:
        raise OffloadError(
            "layers",
            engine.config.layers,
            f"no layer of {'/'.join(model_config.architectures)} that runs through vLLM's "
            "fused-MoE layer is among them",
            "Choose other layers, or drop --plugin moe-offload for this architecture",
        )
    if engine.config.predictor == "gate":
        engine.routers = find_routers(model, engine.specs)
    engine.dense_bytes = _dense_bytes(model, engine)
    _choose_memory(engine, vllm_config, is_served=model_config is vllm_config.model_config)
    budget = engine.plan()
    # Takes memory, in huge pages a good part of the pool: not before the plan has been checked.
    if vllm_config.load_config.load_format != "dummy":  # it leaves integers as they are
        for spec, segment in zip(engine.specs, engine.pool.segments, strict=True):
            fill.mark(segment.filled_views(), spec.transposed)
    logger.info("%s", describe(engine.specs, budget, engine.device.type))
    return model
