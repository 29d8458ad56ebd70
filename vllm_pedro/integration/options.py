"""PEDRO's engine options: what users pass, and how it travels inside vLLM's configuration."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..architectures import MODULES, TARGET_MODULES
from ..backbone import BackboneShape
from ..files import is_int

CONFIG_KEY = "pedro"
"""Key in vLLM's `additional_config`, which reaches every process and is hashed into the key of
the compile cache: a graph with PEDRO and one without must not share an entry."""

VERSION_KEY = "pedro_version"
"""Beside it, this package's version."""

ENABLE_KEYWORD = "enable_pedro"

GENERATORS = "vllm_pedro::generate_vectors"
"""The operator, as vLLM's `splitting_ops` names it."""

MAX_MEMORY = 32 << 30
"""Most bytes for adapters: their places are int32, in units of 16 bytes."""


@dataclass(frozen=True, slots=True)
class PedroOptions:
    """Engine options, as keywords of `LLM` and `AsyncEngineArgs`.

    Attributes:
        max_pedros: Most different adapters that are prefilled in one step; default no more than the
            device's memory for adapters holds. It never bounds how many tenants decode in a batch.
        max_cpu_pedros: Adapters held in host memory; default four times `max_pedros` or, without,
            what the device's memory holds of the largest. On the CPU, whose memory is both, the
            default is no limit but that of the memory.
        max_pedro_rank: Highest `r` an adapter may have.
        pedro_target_modules: Target modules the vector store has columns for; default all but Up in
            experts. Fewer modules make the store smaller and decode read less.
        pedro_memory_bytes: The device's memory for adapters; default see `default_memory`.
    """

    max_pedros: int | None = None
    max_cpu_pedros: int | None = None
    max_pedro_rank: int = 32
    pedro_target_modules: tuple[str, ...] = TARGET_MODULES
    pedro_memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_pedros", "max_cpu_pedros", "pedro_memory_bytes", "max_pedro_rank"):
            value = getattr(self, name)
            if value is None and name != "max_pedro_rank":
                continue
            if not is_int(value) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.max_pedros and self.max_cpu_pedros and self.max_cpu_pedros < self.max_pedros:
            raise ValueError(
                f"max_cpu_pedros ({self.max_cpu_pedros}) must be at least max_pedros "
                f"({self.max_pedros}): the adapters of a step are held in host memory too"
            )
        if (self.pedro_memory_bytes or 0) > MAX_MEMORY:
            raise ValueError(
                f"pedro_memory_bytes must be at most {MAX_MEMORY}, got {self.pedro_memory_bytes}"
            )
        modules = self.pedro_target_modules
        if isinstance(modules, str) or not isinstance(modules, Sequence):
            raise ValueError(f"pedro_target_modules must be a list of names, got {modules!r}")
        unknown = [m for m in modules if m not in MODULES]
        if unknown or not modules:
            raise ValueError(
                f"pedro_target_modules must name some of {', '.join(MODULES)}, "
                f"got {list(modules)!r}"
            )
        object.__setattr__(self, "pedro_target_modules", tuple(m for m in MODULES if m in modules))

    def host_capacity(self, largest: int) -> int:
        """`max_cpu_pedros` with its default filled in, on a device with memory of its own.

        Args:
            largest: Bytes of the largest adapter.
        """
        held = max(1, (self.pedro_memory_bytes or 0) // largest)
        return self.max_cpu_pedros or 4 * (self.max_pedros or held)

    def default_memory(self, total: int, largest: int) -> int:
        """`pedro_memory_bytes` where it is not given.

        A twentieth of the device's memory, and at least what `max_pedros` of the largest adapters
        need, or eight.

        Args:
            total: Bytes of the device's memory.
            largest: Bytes of the largest adapter.
        """
        return min(MAX_MEMORY, max(total // 20, (self.max_pedros or 8) * largest))

    def to_config(self) -> dict[str, Any]:
        """JSON values for `additional_config["pedro"]`."""
        return {
            "max_pedros": self.max_pedros,
            "max_cpu_pedros": self.max_cpu_pedros,
            "max_pedro_rank": self.max_pedro_rank,
            "pedro_target_modules": list(self.pedro_target_modules),
            "pedro_memory_bytes": self.pedro_memory_bytes,
        }

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> PedroOptions:
        """Options from keywords; those that are None keep their default.

        Raises:
            ValueError: An unknown name or a bad value.
        """
        unknown = sorted(set(keywords) - set(OPTION_NAMES))
        if unknown:
            raise ValueError(
                f"unknown PEDRO option(s) {', '.join(unknown)}; known: {', '.join(OPTION_NAMES)}"
            )
        given = {k: v for k, v in keywords.items() if v is not None}
        if isinstance(given.get("pedro_target_modules"), list):
            given["pedro_target_modules"] = tuple(given["pedro_target_modules"])
        return cls(**given)


OPTION_NAMES = tuple(f.name for f in fields(PedroOptions))


def options_of(vllm_config: Any) -> PedroOptions | None:
    """The options an engine runs with, or None where PEDRO is off."""
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, Mapping) or CONFIG_KEY not in additional:
        return None
    return PedroOptions.from_keywords(additional[CONFIG_KEY])


@contextlib.contextmanager
def plain_classes(vllm_config: Any) -> Iterator[None]:
    """Models of transformers are made in here, once an engine has run in this process.

    vLLM's Transformers backend decorates their classes for good: from then on models ask the
    current configuration whether they are to be compiled.
    """
    from vllm.config import CompilationConfig, CompilationMode, set_current_vllm_config

    plain = copy.copy(vllm_config)
    plain.compilation_config = CompilationConfig(mode=CompilationMode.NONE)
    with set_current_vllm_config(plain):
        yield


def shape_of(vllm_config: Any) -> BackboneShape:
    """The backbone's shape by its configuration."""
    with plain_classes(vllm_config):
        return BackboneShape.from_hf_config(vllm_config.model_config.hf_config)


def draft_places(speculative_config: Any) -> int:
    """Places that a row takes in a step's input for its drafts."""
    if speculative_config is None:
        return 0
    return int(speculative_config.max_num_new_slots_for_drafting)


def tokens_for_any_prompt(max_prompt: int, max_num_seqs: int, drafts: int) -> int:
    """Tokens of a step in which a whole prompt starts beside the decode tokens of all other rows.

    Args:
        max_prompt: Tokens of the longest prompt.
        max_num_seqs: Most rows of a step.
        drafts: Tokens that each of them may have drafted.
    """
    return max_prompt + (max_num_seqs - 1) * (1 + drafts)
