"""How vLLM's functions and classes are extended; `plugin.py` lists which functions, and why.

Nearly everything is done by subclassing: a switched-on engine gets its own scheduler class, and its
input processor and model runner change to a subclass of what they are. A patch only decides whether
that happens. Each calls the original, is applied once per process, and does nothing in an engine
without PEDRO. `tests/integration/test_upstream.py` fails when a function that is wrapped or
overridden differs from the one this was written for.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_MARK = "_vllm_pedro_original"
_BY = "_vllm_pedro_patch"

Make = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Patch:
    """One function of vLLM that is replaced by one that calls it.

    Attributes:
        target: `module:Class.function`, or `module:function` for what the module's code calls.
        by: `room:function` of this package; given the original, it returns the replacement.
        why: What vLLM does not let a plugin do otherwise.
        upstream: The issue or pull request of vLLM that is nearest to it.
        until: What makes the patch unnecessary.
    """

    target: str
    by: str
    why: str
    upstream: str
    until: str

    @property
    def module(self) -> str:
        """The module of vLLM that has to be imported before the patch can be applied."""
        return self.target.partition(":")[0]

    def apply(self) -> None:
        """Wrap the function.

        Raises:
            RuntimeError: See `wrap`.
        """
        owner: Any = importlib.import_module(self.module)
        *inside, name = self.target.partition(":")[2].split(".")
        for part in inside:
            owner = getattr(owner, part)
        room, _, make = self.by.partition(":")
        wrap(owner, name, getattr(importlib.import_module(f"{__package__}.{room}"), make))


def wrap(owner: type | ModuleType, name: str, make: Make) -> None:
    """Replace `owner.name` by `make(original)`, once.

    Args:
        owner: The class that defines the function itself (inherited ones are refused, so that a
            moved function is noticed), or the module whose code calls the function by its name.
        name: The function's name.
        make: Given the original function, returns the one to put in its place.

    Raises:
        RuntimeError: The owner does not define the function: vLLM has changed. Or the function is
            wrapped by another `make` already: two patches of one function are a mistake.
    """
    original = vars(owner).get(name)
    where = f"{_full_name(owner)}.{name}"
    if original is None:
        raise RuntimeError(
            f"vllm_pedro cannot find {where}: this vLLM is not the one it was written for"
        )
    by = f"{make.__module__}.{make.__qualname__}"
    kind = type(original) if isinstance(original, (staticmethod, classmethod)) else None
    function = original if kind is None else original.__func__
    first = getattr(function, _BY, None)
    if first == by:
        return
    if first is not None:
        raise RuntimeError(f"vllm_pedro patches {where} twice: by {first} and by {by}")
    replacement = functools.wraps(function)(make(function))
    setattr(replacement, _MARK, function)
    setattr(replacement, _BY, by)
    setattr(owner, name, replacement if kind is None else kind(replacement))
    logger.debug("wrapped %s by %s", where, by)


def _full_name(owner: type | ModuleType) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"


def extend(cls: type, mixin: type) -> type:
    """A subclass of `cls` with `mixin` in front; `cls` itself if it has the mixin already."""
    if issubclass(cls, mixin):
        return cls
    return type(f"Pedro{cls.__name__}", (mixin, cls), {"__module__": __name__})


def become(instance: Any, mixin: type) -> None:
    """Put `mixin` in front of an instance's class, as if it had been created so.

    Raises:
        RuntimeError: Python cannot change this instance's class. Where that is so, the class has to
            be chosen before the instance exists (`extend`).
    """
    cls = type(instance)
    try:
        instance.__class__ = extend(cls, mixin)
    except TypeError as error:
        raise RuntimeError(
            f"vllm_pedro cannot put {mixin.__name__} in front of {_full_name(cls)}: {error}. This "
            "vLLM is not the one it was written for"
        ) from error
