"""What a worker counts about its adapters, for the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TIERS = ("device", "host")
"""Where adapters are held. What is in neither is on disk."""

PREFILL_STATES = ("device", "host", "disk", "cached", "failed")
"""Where a prompt's adapter was found when its vectors were needed; `cached`: its row held them
already; `failed`: the adapter failed to load."""

MAX_SECONDS = 4096


@dataclass(slots=True)
class AdapterStats:
    """Counts since they were last taken.

    Attributes:
        hits, loads, evictions: By tier. A load of `host` is a read from disk, one of `device` a
            copy from host memory.
        removals: Adapters dropped by tier because they were unloaded or replaced.
        prefills: Prompts by `PREFILL_STATES`.
        seconds: Durations of loads by tier; at most `MAX_SECONDS` are kept.
    """

    hits: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    evictions: Counter[str] = field(default_factory=Counter)
    removals: Counter[str] = field(default_factory=Counter)
    prefills: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def loaded(self, tier: str, seconds: float) -> None:
        """An adapter came into a tier."""
        self.loads[tier] += 1
        kept = self.seconds.setdefault(tier, [])
        if len(kept) < MAX_SECONDS:
            kept.append(seconds)

    def take(self) -> dict[str, Any]:
        """The counts as plain values, which are then zero again; empty if nothing happened."""
        taken: dict[str, Any] = {}
        for name in ("hits", "loads", "evictions", "removals", "prefills"):
            counts: Counter[str] = getattr(self, name)
            if counts:
                taken[name] = dict(counts)
                counts.clear()
        if self.seconds:
            taken["seconds"], self.seconds = self.seconds, {}
        return taken


def merge_stats(total: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Add what `AdapterStats.take` gave to an earlier one.

    `resident`, adapters by tier, and `used_bytes` of the device are states: the later one replaces
    the earlier one.
    """
    for name, values in new.items():
        if name in ("resident", "used_bytes"):
            total[name] = values
        elif name == "seconds":
            for tier, seconds in values.items():
                kept = total.setdefault(name, {}).setdefault(tier, [])
                kept.extend(seconds[: MAX_SECONDS - len(kept)])
        else:
            counts = total.setdefault(name, {})
            for key, count in values.items():
                counts[key] = counts.get(key, 0) + count
