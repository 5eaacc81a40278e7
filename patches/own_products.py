"""Quantised methods without a backend of vLLM: the products are the plugin's own.

Target: the ``select_..._backend`` functions that the modules of vLLM's quantised fused-MoE
    methods call when a method is constructed.
Versions: 0.32, 0.33.
Why: a backend decides how weights are padded, repacked and moved to the GPU as a whole, and on
    some machines there is none, while the plugin multiplies the checkpoint's own bits anywhere.
How: while an offloaded layer gets its method, the functions name a backend that changes neither
    sizes nor weights, with no kernel.
Can go: when vLLM lets a plugin register a backend of its own.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vllm_moe_offload.patches.wrapping import PatchError

_HERE = "vllm.model_executor.layers.quantization"
_COMPRESSED = f"{_HERE}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe"
_ORACLES = "vllm.model_executor.layers.fused_moe.oracle"

_SELECTORS = {
    "fp8": {f"{_HERE}.fp8": ("select_fp8_moe_backend",)},
    "compressed-tensors": {
        f"{_COMPRESSED}_w8a8_fp8": ("select_fp8_moe_backend",),
        f"{_COMPRESSED}_wna16": ("select_wna16_moe_backend",),
        f"{_COMPRESSED}_w4a4_nvfp4": ("select_nvfp4_moe_backend",),
    },
    "auto_gptq": {
        f"{_HERE}.auto_gptq": ("select_wna16_moe_backend",),
        f"{_HERE}.moe_wna16": ("select_wna16_moe_backend",),
    },
    "auto_awq": {
        f"{_HERE}.auto_awq": ("select_wna16_moe_backend",),
        f"{_HERE}.moe_wna16": ("select_wna16_moe_backend",),
    },
    "moe_wna16": {f"{_HERE}.moe_wna16": ("select_wna16_moe_backend",)},
    "gpt_oss_mxfp4": {f"{_HERE}.mxfp4": ("select_mxfp4_moe_backend",)},
    "mxfp4": {f"{_HERE}.mxfp4": ("select_deepseek_v4_mxfp4_moe_backend",)},
    "modelopt_fp4": {f"{_HERE}.modelopt": ("select_nvfp4_moe_backend",)},
}
"""Functions by the name of the quantisation and the module whose attribute they are."""


@contextmanager
def own_products(quant_config: Any) -> Iterator[None]:
    """Let methods that are constructed inside the context do without a backend.

    Raises:
        PatchError: this vLLM selects backends in another way.
    """
    name = None if quant_config is None else quant_config.get_name()
    replaced: list[tuple[Any, str, Callable[..., Any]]] = []
    try:
        for path, functions in _SELECTORS.get(str(name), {}).items():
            module = importlib.import_module(path)
            for function in functions:
                original = getattr(module, function, None)
                if original is None:
                    raise PatchError(
                        f"moe-offload: {path} has no {function} in this version of vLLM. "
                        "Install a tested version of vLLM, or drop --plugin moe-offload."
                    )
                replaced.append((module, function, original))
                setattr(module, function, _BACKENDS[function])
        yield
    finally:
        for module, function, original in replaced:
            setattr(module, function, original)


def _fp8(*_: Any, **__: Any) -> tuple[Any, None]:
    return _oracle("fp8").Fp8MoeBackend.NONE, None


def _wna16(*_: Any, quant_config: Any = None, **__: Any) -> tuple[Any, None]:
    backend = _oracle("int_wna16").WNA16MoEBackend
    # compressed-tensors refuses scales for whole channels with all backends but this one.
    strategy = getattr(quant_config, "strategy", None)
    channels = getattr(strategy, "value", strategy) == "channel"
    return (backend.MARLIN if channels else backend.EMULATION), None


def _mxfp4(*_: Any, **__: Any) -> tuple[Any, None]:
    return _oracle("mxfp4").Mxfp4MoeBackend.EMULATION, None


def _nvfp4(*_: Any, **__: Any) -> tuple[Any, None]:
    return _oracle("nvfp4").NvFp4MoeBackend.EMULATION, None


_BACKENDS: dict[str, Callable[..., Any]] = {
    "select_fp8_moe_backend": _fp8,
    "select_wna16_moe_backend": _wna16,
    "select_mxfp4_moe_backend": _mxfp4,
    "select_deepseek_v4_mxfp4_moe_backend": _mxfp4,
    "select_nvfp4_moe_backend": _nvfp4,
}


def _oracle(name: str) -> Any:
    return importlib.import_module(f"{_ORACLES}.{name}")
