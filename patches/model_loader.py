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
from vllm_moe_offload.patches.engine_process import offloads
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
    if not offloads(vllm_config.additional_config):
        return original(self, vllm_config, model_config, prefix)
    # Its imports may be incomplete when we are applied.
    from vllm_moe_offload.layer import building

    device = vllm_config.load_config.device or vllm_config.device_config.device
    config = MoeOffloadConfig.parse(vllm_config.additional_config[KEY])
    engine = OffloadEngine(
        config,
        torch.device(device),
        workers_on_host=_workers_on_host(vllm_config.parallel_config),
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


def _workers_on_host(parallel_config: Any) -> int:
    """Workers that take host memory at the same time: of all local engines of data parallelism."""
    engines = max(1, parallel_config.data_parallel_size_local)
    return int(engines * parallel_config.local_world_size)


def _choose_memory(engine: OffloadEngine, vllm_config: Any, *, is_served: bool) -> None:
    """Let the slots be borrowed from the KV cache if nobody said otherwise and it can be shared."""
    engine.device_free = _usable_bytes(vllm_config.cache_config, engine.device)
    others = (other.budget for other in engines_of_loading_worker())
    engine.taken_bytes = sum(budget.slot_bytes for budget in others if budget is not None)
    if not engine.config.wants_to_borrow:
        return
    engine.not_shared = why_not_shared(vllm_config) if is_served else "it is that of a draft model"
    engine.borrows = engine.not_shared is None
    if not engine.borrows:
        logger.info(
            "moe-offload: the KV cache is not shared with experts, because %s. The split is made "
            "now: a quarter of the experts is held in slots, or as many as half of the memory that "
            "is left holds; gpu_gb gives another size.",
            engine.not_shared,
        )


def _usable_bytes(cache_config: Any, device: torch.device) -> int | None:
    """What vLLM may still take of a GPU; the dense weights have their memory by now.

    Its share is that of this process: others may use the same GPU.
    """
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    if cache_config.kv_cache_memory_bytes:
        return max(0, int(free - cache_config.kv_cache_memory_bytes))
    share = int(cache_config.gpu_memory_utilization * total)
    return max(0, min(free, share - torch.cuda.memory_reserved(device)))


def _dense_bytes(model: torch.nn.Module, engine: OffloadEngine) -> int:
    """Bytes of the weights outside the pool; known now, since kernels may put them elsewhere."""
    pool = engine.pool.storages()
    sizes = {
        weight.data_ptr(): weight.nbytes  # some layers share theirs
        for weight in model.parameters()
        if weight.device.type == engine.device.type
        and weight.untyped_storage().data_ptr() not in pool
    }
    return sum(sizes.values())


def _is_stage_of_others(vllm_config: Any, config: MoeOffloadConfig) -> bool:
    """Whether other pipeline stages have the layers that are offloaded.

    The first stages of a model may be dense, and ``layers`` may leave any of them out.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if parallel.pipeline_parallel_size == 1:
        return False
    start, end = model.get_layers_start_end_indices(parallel)
    is_last = end == model.get_total_num_hidden_layers()
    return not is_last or not any(map(config.includes, range(start, end)))


def _create_model(
    original: Callable[..., Any], self: Any, vllm_config: Any, model_config: Any, prefix: str = ""
) -> Any:
    from vllm_moe_offload.layer import building_engine

    model = original(self, vllm_config, model_config, prefix)
    engine = building_engine()
    if engine is None:
        return model
    if not engine.specs and model_config is not vllm_config.model_config:
        logger.info("moe-offload: no layer of the draft model has experts in the host pool.")
        return model
    if not engine.specs and _is_stage_of_others(vllm_config, engine.config):
        logger.info("moe-offload: no layer of this pipeline stage has experts in the host pool.")
        return model
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
