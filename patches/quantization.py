"""A quantisation that vLLM itself refuses is refused with the list of what works.

Target: ``VllmConfig._get_quantization_config`` in vllm.config.vllm, ``ModelConfig`` and its
    ``_verify_quantization``.
Versions: 0.32, 0.33.
Why: vLLM names what is wrong while it makes its configuration, and not what could be used instead.
How: remember what these two refuse while an offloaded model is configured, and raise our error
    when the configuration has failed: inside, pydantic would make another error of it.
Can go: when vLLM raises an error of its own for quantisations.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from vllm_moe_offload.patches.wrapping import wrap
from vllm_moe_offload.schemes import refusal

_refused: ContextVar[list[tuple[Any, Exception]] | None] = ContextVar(
    "moe_offload_refused_quantization", default=None
)


def apply(module: ModuleType) -> None:
    """Remember what vLLM refuses."""
    wrap(module.VllmConfig, "_get_quantization_config", _get_quantization_config)
    wrap(module.ModelConfig, "_verify_quantization", _verify_quantization)


@contextmanager
def naming_what_works() -> Iterator[None]:
    """Raise our error for a quantisation that vLLM refuses inside the context.

    Raises:
        OffloadError: with vLLM's reason and the list of what works.
    """
    refused: list[tuple[Any, Exception]] = []
    token = _refused.set(refused)
    try:
        yield
    except Exception as error:
        if not refused:
            raise
        model_config, reason = refused[-1]
        raise refusal(
            model_config.quantization, model_config.model, f"vLLM refuses it ({reason})"
        ) from error
    finally:
        _refused.reset(token)


def _get_quantization_config(
    original: Callable[..., Any], model_config: Any, *args: Any, **kwargs: Any
) -> Any:
    try:
        return original(model_config, *args, **kwargs)
    except Exception as reason:
        # Of --dtype vLLM's error says all that there is to say.
        if not str(reason).startswith(f"{model_config.dtype} is not supported"):
            _remember(model_config, reason)
        raise


def _verify_quantization(original: Callable[..., None], self: Any) -> None:
    try:
        original(self)
    except Exception as reason:
        _remember(self, reason)
        raise


def _remember(model_config: Any, reason: Exception) -> None:
    if (refused := _refused.get()) is not None:
        refused.append((model_config, reason))
