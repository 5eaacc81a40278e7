"""The engine core lends its KV cache's memory once its scheduler stands.

Target: ``EngineCore.__init__`` in vllm.v1.engine.core.
Versions: 0.32, 0.33.
Why: the scheduler and the workers meet only there, and in it both halves are ready.
How: the workers are asked for their boundary through ``collective_rpc``, the scheduler starts to
    lend, and the first order goes to the workers at once rather than with the first step, so that
    a warm start finds its slots open.
Can go: when vLLM can resize its cache.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from vllm.logger import init_logger

from vllm_moe_offload.config import KEY, MoeOffloadConfig
from vllm_moe_offload.lending.boundary import Boundary
from vllm_moe_offload.lending.controller import AutoPolicy, FixedPolicy, Policy
from vllm_moe_offload.patches.borrowing import Share
from vllm_moe_offload.patches.scheduler import start_lending
from vllm_moe_offload.patches.wrapping import wrap
from vllm_moe_offload.sizes import format_size

logger = init_logger("vllm.moe_offload")

NO_ROOM = (
    "moe-offload: experts get no slots, because the part of the KV cache that they never borrow is "
    "all of it, so every step loads all experts that it needs. A smaller --max-model-len or "
    "--moe-offload-kv-floor, or a larger --gpu-memory-utilization leaves room for slots."
)


def apply(module: ModuleType) -> None:
    """Let engine cores lend."""
    wrap(module.EngineCore, "__init__", _init)


def _init(original: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    options = self.vllm_config.additional_config
    if isinstance(options, dict) and options.get(KEY) is not None:
        _start(self, MoeOffloadConfig.parse(options[KEY]))


def _start(core: Any, config: MoeOffloadConfig) -> None:
    shares = [share for share in core.model_executor.collective_rpc("moe_offload_share") if share]
    if not shares:
        return
    lent = 0
    if shares[0].boundary is not None:
        boundary = _agreed(shares)
        lending = start_lending(core.scheduler, boundary, _policy(config, boundary))
        if order := lending.lender.opens():
            reports = core.model_executor.collective_rpc("moe_offload_follow", args=(order,))
            lending.lender.book.file(reports[0])
        lent = lending.lender.ledger.lent
        if boundary.max_increments == 0:
            logger.warning(NO_ROOM)
    logger.info("moe-offload: %s", describe(shares, lent, core.vllm_config.cache_config))


def _agreed(shares: list[Share]) -> Boundary:
    boundaries = {share.boundary for share in shares}
    assert len(boundaries) == 1, f"the workers have different boundaries: {boundaries}"
    (boundary,) = boundaries
    assert boundary is not None
    return boundary


def _policy(config: MoeOffloadConfig, boundary: Boundary) -> Policy:
    if config.kv_policy == "fixed":
        return FixedPolicy(boundary.max_increments)
    return AutoPolicy(boundary)


def describe(shares: list[Share], lent: int, cache_config: Any) -> str:
    """One line on how the memory of each worker is split.

    Args:
        shares: of all workers, before anything was lent.
        lent: increments that are lent now.
        cache_config: vLLM's, which knows its blocks.
    """
    share = shares[0]
    each = f"in each of {len(shares)} workers " if len(shares) > 1 else ""
    total = f"{format_size(share.total_bytes)} for vLLM, " if share.total_bytes else ""
    boundary, blocks = share.boundary, cache_config.num_gpu_blocks
    if boundary is None:
        slots = share.slots
        # Of a hybrid model, whose layers take blocks in groups, only vLLM knows it.
        tokens = getattr(cache_config, "kv_cache_size_tokens", None)
        tokens = blocks * cache_config.block_size if tokens is None else tokens
        why = f"not shared: {share.reason}" if share.reason else "not shared"
    else:
        slots, first = lent * share.layers, boundary.first_block(lent)
        tokens = first * cache_config.block_size
        lowest = boundary.first_block(boundary.max_increments)
        lent_bytes = format_size(lent * boundary.increment_bytes)
        why = f"boundary at block {first} of {blocks}, never below {lowest}; {lent_bytes} are lent"
    return (
        f"{each}{total}{format_size(share.dense_bytes)} dense weights, slots for {slots} of "
        f"{share.experts} experts, KV cache of {tokens} tokens, {why}"
    )
