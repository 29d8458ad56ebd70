"""Run something once a module has been imported, without importing it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` right after module `name` is executed; at once if it already was."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if type(spec) in (ModuleSpec, _ExecutingSpec) and spec._initializing:  # type: ignore[union-attr]
        spec.__class__ = _ExecutingSpec
        spec.__dict__.setdefault("_pedro_actions", []).append(action)
    elif name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


def forget_hooks() -> None:
    """Drop every action that still waits for its module."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]


class _ExecutingSpec(ModuleSpec):
    """The spec of a module that is being executed: the import system notes there when it was.

    vLLM may import this package from within the module, and whoever imports that uses it next.
    """

    @property
    def _initializing(self) -> bool:
        return bool(self.__dict__["_initializing"])

    @_initializing.setter
    def _initializing(self, value: bool) -> None:
        self.__dict__["_initializing"] = value
        if not value:
            actions = self.__dict__.pop("_pedro_actions")
            object.__setattr__(self, "__class__", ModuleSpec)
            if self.name in sys.modules:  # its execution did not fail
                for action in actions:
                    action()


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name = name
        self._action = action
        self._is_looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_looking = False
        if spec is None or spec.loader is None:
            return None
        # Looking for a module is not importing it: the finder stays until the module is executed.
        spec.loader = _Loader(spec.loader, self._act)
        return spec

    def _act(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._action()


class _Loader(importlib.abc.Loader):
    """The module's own loader, then the action."""

    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self._loader = loader
        self._action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._action()
