"""Random weights of one layer of experts for all that are like it, under ``load_format=dummy``.

Target: ``DummyModelLoader.load_weights``, and ``initialize_single_dummy_weight`` which it calls, in
    vllm.model_executor.model_loader.dummy_loader.
Versions: 0.32, 0.33.
Why: vLLM draws numbers on one thread where the weights are, a quarter of a gigabyte a second on the
    host; all its draws begin with the same seed, so tensors of one shape come out alike.
How: copy a tensor of the pool from the first one like it.
Can go: when vLLM draws on many threads.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vllm_moe_offload.patches.wrapping import wrap


def apply(module: ModuleType) -> None:
    """Draw once for all layers."""
    wrap(module.DummyModelLoader, "load_weights", _load_weights)
    wrap(module, "initialize_single_dummy_weight", _initialize)


class _Drawn:
    """Tensors of the pool that have been drawn."""

    def __init__(self, storages: set[int]) -> None:
        self._storages = storages
        self._first: dict[Any, Tensor] = {}

    def like(self, weight: Tensor, key: Any) -> Tensor | None:
        """The first one like it, which is not itself; None if it has to be drawn."""
        if weight.untyped_storage().data_ptr() not in self._storages:
            return None
        key = weight.shape, weight.stride(), weight.dtype, key
        first = self._first.setdefault(key, weight)
        return None if first.data_ptr() == weight.data_ptr() else first


_drawn: _Drawn | None = None


def _load_weights(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    global _drawn  # noqa: PLW0603
    from vllm_moe_offload.layer import building_engine

    engine = building_engine()
    if engine is None or not engine.specs:
        return original(self, *args, **kwargs)
    _drawn = _Drawn(engine.pool.storages())
    try:
        return original(self, *args, **kwargs)
    finally:
        _drawn = None


def _initialize(original: Callable[..., Any], param: Tensor, *args: Any, **kwargs: Any) -> None:
    special = getattr(param, "dummy_weight_value", None), args, tuple(sorted(kwargs.items()))
    first = _drawn.like(param, special) if _drawn is not None else None
    if first is None:
        original(param, *args, **kwargs)
        return
    with torch.no_grad():
        param.copy_(first)
