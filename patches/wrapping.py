"""Replace an attribute of a vLLM class or module by a function that wraps it, or fail loudly."""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MARK = "_moe_offload_wraps"


class PatchError(RuntimeError):
    """vLLM's inside is not what a patch expects."""


def wrap(owner: type | ModuleType, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace ``owner.name`` by ``wrapper(original, ...)``.

    Static and class methods stay what they are: the wrapper of a static method gets the original
    and the arguments, that of a method the original, the instance and the arguments. Wrapping
    again is a no-op.

    Args:
        owner: the class, or the module of a function, that is patched.
        name: the attribute.
        wrapper: called with the original first.

    Raises:
        PatchError: the owner has no such attribute.
    """
    raw = inspect.getattr_static(owner, name, None)
    if raw is None:
        is_module = isinstance(owner, ModuleType)
        place = owner.__name__ if is_module else f"{owner.__module__}.{owner.__qualname__}"
        raise PatchError(
            f"moe-offload: {place} has no {name} in this version of vLLM. Install a tested "
            "version of vLLM, or drop --plugin moe-offload."
        )
    function = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
    if hasattr(function, _MARK):
        return

    @functools.wraps(function)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(function, *args, **kwargs)

    setattr(replacement, _MARK, function)
    kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
    setattr(owner, name, kind(replacement) if kind else replacement)
