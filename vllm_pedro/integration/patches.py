"""The few functions of vLLM that are wrapped, and how.

Nearly everything else is done by subclassing: a switched-on engine gets its own scheduler class,
and its input processor and model runner change to a subclass of what they are. What stands here
only decides whether that happens. Each patch calls the original, is applied once per process, and
does nothing in an engine without PEDRO. ``tests/integration/test_upstream.py`` fails when a
function that is wrapped or overridden differs from the one this was written for.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

_MARK = "_vllm_pedro_original"


def wrap(
    owner: type | ModuleType, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replace ``owner.name`` by ``make(original)``, once.

    Args:
        owner: The class that defines the function itself (inherited ones are refused, so that a
            moved function is noticed), or the module whose code calls the function by its name.
        name: The function's name.
        make: Given the original function, returns the one to put in its place.

    Raises:
        RuntimeError: The owner does not define the function: vLLM has changed.
    """
    original = vars(owner).get(name)
    if original is None:
        raise RuntimeError(
            f"vllm_pedro cannot find {_full_name(owner)}.{name}: this vLLM is not the one it was "
            "written for"
        )
    if hasattr(original, _MARK):
        return
    kind = type(original) if isinstance(original, (staticmethod, classmethod)) else None
    function = original if kind is None else original.__func__
    replacement = functools.wraps(function)(make(function))
    setattr(replacement, _MARK, function)
    setattr(owner, name, replacement if kind is None else kind(replacement))
    logger.debug("wrapped %s.%s", _full_name(owner), name)


def _full_name(owner: type | ModuleType) -> str:
    if isinstance(owner, ModuleType):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"


def extend(cls: type, mixin: type) -> type:
    """A subclass of ``cls`` with ``mixin`` in front; ``cls`` itself if it has the mixin already."""
    if issubclass(cls, mixin):
        return cls
    return type(f"Pedro{cls.__name__}", (mixin, cls), {"__module__": __name__})


def become(instance: Any, mixin: type) -> None:
    """Put ``mixin`` in front of an instance's class, as if it had been created so.

    Raises:
        RuntimeError: Python cannot change this instance's class. Where that is so, the class has to
            be chosen before the instance exists (:func:`extend`).
    """
    cls = type(instance)
    try:
        instance.__class__ = extend(cls, mixin)
    except TypeError as error:
        raise RuntimeError(
            f"vllm_pedro cannot put {mixin.__name__} in front of {_full_name(cls)}: {error}. This "
            "vLLM is not the one it was written for"
        ) from error
