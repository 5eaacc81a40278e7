"""Run a function once a module has been imported, without importing it."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]

_pending: dict[str, list[Callback]] = {}


def call(name: str, callback: Callback) -> None:
    """Call back with the module, now if it is there, else right after its import."""
    module = sys.modules.get(name)
    if module is not None and not _is_initializing(module):
        callback(module)
        return
    if module is not None:
        # Our finder comes too late for this import.
        module.__spec__.__class__ = _CallingSpec
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _pending.setdefault(name, []).append(callback)


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _call_back(module: ModuleType) -> None:
    for callback in _pending.pop(module.__name__, []):
        callback(module)


class _CallingSpec(ModuleSpec):
    """Spec of a module that is being imported, which calls back when that has succeeded."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name != "_initializing" or value:
            return
        self.__class__ = ModuleSpec  # type: ignore[assignment]
        module = sys.modules.get(self.name)
        if module is not None and module.__spec__ is self:
            _call_back(module)


class _Finder(MetaPathFinder):
    """Finds the awaited modules as usual, with a loader that calls back."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _pending:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _CallingLoader(spec.loader)
        return spec


class _CallingLoader(Loader):
    """Delegates to the real loader and then calls back."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must look as if it had been imported without us.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _call_back(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_FINDER = _Finder()
