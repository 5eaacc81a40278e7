"""Compile kernels ahead, several at a time.

Triton compiles a kernel when it is first launched with arguments of new types or with new
compile-time sizes, which takes seconds. Its compiler leaves Python's lock for most of them, so
threads are enough.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton import AsyncCompileMode
from triton.runtime.jit import JITFunction

from vllm_moe_offload.kernels import (
    _dispatch_triton,
    _expert_mlp_triton,
    _gather_triton,
    _learn_triton,
    _predict_triton,
    _prefetch_triton,
    _quantise_triton,
    _quantised_mlp_triton,
    _resolve_triton,
    _tally_triton,
)

_MODULES = (
    _dispatch_triton, _expert_mlp_triton, _gather_triton, _learn_triton, _predict_triton,
    _prefetch_triton, _quantise_triton, _quantised_mlp_triton, _resolve_triton, _tally_triton,
)  # fmt: skip


def kernels() -> list[JITFunction[Any]]:
    """All that the operations launch; none in Triton's interpreter, which compiles nothing."""
    found = [value for module in _MODULES for name, value in vars(module).items()
             if name.endswith("_kernel") and isinstance(value, JITFunction)]  # fmt: skip
    return list(dict.fromkeys(found))


@contextmanager
def compiling(threads: int) -> Iterator[AsyncCompileMode]:
    """Let launches inside the context compile what is not yet compiled, and compute nothing.

    At the end of the context everything is compiled.

    Args:
        threads: kernels that are compiled at a time.

    Returns:
        Triton's mode, which knows what there was to compile.
    """
    with (
        ThreadPoolExecutor(threads, "moe-offload-compile") as pool,
        AsyncCompileMode(pool) as mode,
        _launching_nothing(),
    ):
        yield mode


@contextmanager
def _launching_nothing() -> Iterator[None]:
    changed = kernels()
    for kernel in changed:
        kernel.run = _compile_only(kernel.run)
    try:
        yield
    finally:
        for kernel in changed:
            del kernel.run  # the method is there again


def _compile_only(run: Callable[..., Any]) -> Callable[..., Any]:
    def compile_only(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        del warmup
        return run(*args, grid=grid, warmup=True, **kwargs)

    return compile_only
