"""What kernels would be compiled for: Triton's own key of every launch, which is not made."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, KernelParam, native_specialize_impl

Key = tuple[object, ...]


@contextmanager
def recorded() -> Iterator[set[Key]]:
    """Collect the keys of all launches inside, of which none is made."""
    keys: set[Key] = set()

    def run(kernel: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        del grid, warmup
        keys.add(key_of(kernel, args, kwargs))

    with (
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield keys


def key_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
    """What Triton compiles a kernel anew for, as ``create_function_from_signature`` collects it."""
    params = _params(kernel)
    left = dict(kwargs)
    values = (*args, *(left.pop(param.name) for param in params[len(args) :]))
    specialised = tuple(map(_of_argument, params, values))
    return kernel.fn.__name__, specialised, tuple(sorted(left.items()))


@cache
def _params(kernel: Any) -> tuple[KernelParam, ...]:
    if isinstance(kernel, JITFunction):
        return tuple(kernel.params)
    options = ("do_not_specialize", "do_not_specialize_on_alignment")
    return tuple(JITFunction(kernel.fn, **{o: kernel.kwargs.get(o) for o in options}).params)


def _of_argument(param: KernelParam, value: Any) -> object:
    if param.is_constexpr:
        return value
    align = not param.do_not_specialize_on_alignment
    specialise = not param.do_not_specialize
    return native_specialize_impl(BaseBackend, value, param.is_const, specialise, align)
