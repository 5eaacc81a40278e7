"""The swap: routed experts get an offload-aware quantisation method.

Target: ``RoutedExperts._get_quant_method`` in vllm.model_executor.layers.fused_moe.routed_experts.
Versions: 0.32, 0.33.
Why: registering a replacement class by name misses the subclasses (gpt-oss, Transformers, ...).
How: ask for a backend with one weight tensor an expert and routing outside, call the original,
    and mix offloading into what it returns.
Can go: when vLLM lets a plugin provide expert weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vllm_moe_offload.config import KEY
from vllm_moe_offload.errors import OffloadError
from vllm_moe_offload.patches.own_products import own_products
from vllm_moe_offload.patches.tuned_tiles import tuned_tiles
from vllm_moe_offload.patches.wrapping import wrap
from vllm_moe_offload.schemes import refusal


def apply(module: ModuleType) -> None:
    """Swap the method of every layer that the engine under construction takes."""
    wrap(module.RoutedExperts, "_get_quant_method", _get_quant_method)


def _get_quant_method(
    original: Callable[..., Any], self: Any, prefix: str, quant_config: Any, moe_config: Any
) -> Any:
    # Imports from the package that holds the target, which is incomplete when we are applied.
    from vllm_moe_offload import layer as offload_layer

    engine = offload_layer.building_engine()
    if engine is None:
        _refuse_foreign_loader()
    if engine is None or not engine.config.includes(_decoder_layer(prefix)):
        return original(self, prefix, quant_config, moe_config)
    if hasattr(moe_config, "require_decomposed_backend"):
        moe_config.require_decomposed_backend = True
    on_gpu = moe_config.device.type == "cuda"
    if quant_config is None and on_gpu:
        moe_config.moe_backend = "triton"
    with own_products(quant_config), _refusing(prefix, quant_config):
        method = original(self, prefix, quant_config, moe_config)
    if offload_layer.is_quantised(method):
        offload_layer.offload_quantised(method, engine, prefix)
        return method
    if quant_config is not None and on_gpu:
        # Its experts are not quantised. The backend for these means another one to quantised ones.
        moe_config.moe_backend = "triton"
        method = original(self, prefix, quant_config, moe_config)
    offload_layer.offload(method, engine, prefix, tuned_tiles(moe_config))
    return method


@contextmanager
def _refusing(prefix: str, quant_config: Any) -> Iterator[None]:
    """Add to vLLM's refusal of a quantised layer what works.

    Raises:
        OffloadError: instead of vLLM's error.
    """
    try:
        yield
    except (ValueError, NotImplementedError, AssertionError) as error:
        if quant_config is None or isinstance(error, OffloadError):
            raise
        raise refusal(quant_config.get_name(), prefix, f"vLLM refuses it ({error})") from error


def _refuse_foreign_loader() -> None:
    """Refuse to build an offloaded model's layers where no engine takes them.

    Raises:
        OffloadError: the model is to be offloaded, but its loader does not build it as others do.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    extra = None if config is None else config.additional_config
    if isinstance(extra, dict) and extra.get(KEY) is not None:
        raise OffloadError(
            "--load-format",
            config.load_config.load_format,
            "this loader builds the model by itself, so its experts cannot be offloaded",
            "Use --load-format auto, or drop --plugin moe-offload",
        )


def _decoder_layer(prefix: str) -> int:
    """First number in a layer's name: its decoder layer."""
    return next((int(part) for part in prefix.split(".") if part.isdigit()), 0)
