"""What is compared: engines, and what they are asked to do."""

from __future__ import annotations

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
        kind: `plain` (vLLM that does not load the plugin), `base` (the plugin loaded, PEDRO
            off), `pedro` or `lora`; static vectors are served by `pedro`.
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
    def mode(self) -> str:
        return "compiled" if self.compiled else "eager"

    @property
    def name(self) -> str:
        return f"{LABELS[self.kind]}, {self.mode}"


@dataclass(frozen=True)
class Job:
    """A workload for an engine in another process.

    Attributes:
        workload: What to run.
        adapters: `(name, folder)` of the tenants, by number.
    """

    workload: Workload
    adapters: tuple[tuple[str, str], ...] = ()
