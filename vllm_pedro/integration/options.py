"""PEDRO's engine options: what users pass, and how it travels inside vLLM's configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..backbone import TARGET_MODULES

CONFIG_KEY = "pedro"
"""Key in vLLM's `additional_config`, which reaches every process and is hashed into the key of
the compile cache: a graph with PEDRO and one without must not share an entry."""

ENABLE_KEYWORD = "enable_pedro"


@dataclass(frozen=True, slots=True)
class PedroOptions:
    """Engine options, as keywords of `LLM` and `AsyncEngineArgs`.

    Attributes:
        max_pedros: Adapters resident on the device at once. Bounds how many different adapters are
            prefilled in one step, never how many tenants decode in one batch.
        max_cpu_pedros: Adapters held in host memory; default four times `max_pedros`.
        max_pedro_rank: Highest `r` an adapter may have.
        pedro_target_modules: Target modules the vector store has columns for; default all five.
            Fewer modules make the store smaller and decode read less.
    """

    max_pedros: int = 8
    max_cpu_pedros: int | None = None
    max_pedro_rank: int = 32
    pedro_target_modules: tuple[str, ...] = TARGET_MODULES

    def __post_init__(self) -> None:
        for name in ("max_pedros", "max_cpu_pedros", "max_pedro_rank"):
            value = getattr(self, name)
            if value is None and name == "max_cpu_pedros":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.max_cpu_pedros is not None and self.max_cpu_pedros < self.max_pedros:
            raise ValueError(
                f"max_cpu_pedros ({self.max_cpu_pedros}) must be at least max_pedros "
                f"({self.max_pedros}): an adapter on the device is held in host memory too"
            )
        modules = self.pedro_target_modules
        if isinstance(modules, str) or not isinstance(modules, Sequence):
            raise ValueError(f"pedro_target_modules must be a list of names, got {modules!r}")
        unknown = [m for m in modules if m not in TARGET_MODULES]
        if unknown or not modules:
            raise ValueError(
                f"pedro_target_modules must name some of {', '.join(TARGET_MODULES)}, "
                f"got {list(modules)!r}"
            )
        object.__setattr__(
            self, "pedro_target_modules", tuple(m for m in TARGET_MODULES if m in modules)
        )

    @property
    def host_capacity(self) -> int:
        """`max_cpu_pedros` with its default filled in."""
        return self.max_cpu_pedros or 4 * self.max_pedros

    def to_config(self) -> dict[str, Any]:
        """JSON values for `additional_config["pedro"]`."""
        return {
            "max_pedros": self.max_pedros,
            "max_cpu_pedros": self.max_cpu_pedros,
            "max_pedro_rank": self.max_pedro_rank,
            "pedro_target_modules": list(self.pedro_target_modules),
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
