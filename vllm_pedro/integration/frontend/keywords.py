"""`LLM(enable_pedro=True, max_pedros=...)`: keywords that vLLM's `EngineArgs` learns.

Upstream: `EngineArgs` is a dataclass without a place for a plugin's fields, and plugins load in
its `__post_init__`, after the keywords are read; so this runs when `vllm_pedro` is imported.
Can go when: vLLM lets plugins add engine arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..options import CONFIG_KEY, ENABLE_KEYWORD, OPTION_NAMES, PedroOptions
from ..versions import check_vllm_version

PLUGIN_NAME = "vllm_pedro"
"""Name of the entry point in `vllm.general_plugins`."""


def take_keywords(keywords: dict[str, Any]) -> PedroOptions | None:
    """Remove PEDRO's keywords from `keywords`; the options if they switch it on.

    Raises:
        ValueError: A bad value, or an option for an engine that PEDRO is not switched on for.
    """
    enabled = keywords.pop(ENABLE_KEYWORD, False)
    if not isinstance(enabled, bool):
        raise ValueError(f"{ENABLE_KEYWORD} must be True or False, got {enabled!r}")
    given = {name: keywords.pop(name) for name in OPTION_NAMES if name in keywords}
    options = PedroOptions.from_keywords(given)
    return options if enabled else None


def with_keywords(original: Callable[..., None]) -> Callable[..., None]:
    """Patch of `EngineArgs` and `AsyncEngineArgs`."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        options = take_keywords(kwargs)
        if options is not None:
            _check_plugin_loads()
            additional = dict(kwargs.get("additional_config") or {})
            additional[CONFIG_KEY] = options.to_config()
            kwargs["additional_config"] = additional
        return original(self, *args, **kwargs)

    return __init__


def _check_plugin_loads() -> None:
    """Refuse an environment in which the other processes would serve the plain backbone.

    Raises:
        RuntimeError: This vLLM is outside the supported window.
        ValueError: `VLLM_PLUGINS` leaves this plugin out.
    """
    import vllm
    from vllm import envs

    check_vllm_version(vllm.__version__)
    if envs.VLLM_PLUGINS is not None and PLUGIN_NAME not in envs.VLLM_PLUGINS:
        raise ValueError(
            f"PEDRO is enabled, but VLLM_PLUGINS leaves its plugin out: add {PLUGIN_NAME!r} to it"
        )
