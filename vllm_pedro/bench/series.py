"""Measurements of one case in order of the repeats, and what they are compared with."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PedroError
from .cases import case_label
from .figures import Latency, Spread, break_even, paired_ratios
from .results import by_run

Record = dict[str, Any]


@dataclass
class Series:
    """One case of one workload: all its repeats.

    Attributes:
        repeats: Repeat -> measures.
        fairness: Repeat -> fairness figures, where several tenants asked.
    """

    family: str
    x: float
    workload: str
    rule: str
    kind: str
    mode: str
    tenants: int
    repeats: dict[int, dict[str, float]] = field(default_factory=dict)
    fairness: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return case_label(self.kind, self.mode, self.tenants)

    @property
    def asked(self) -> tuple[str, str, str]:
        """What it shares with those that it is compared with."""
        return self.family, self.workload, self.rule

    def values(self, measure: str) -> dict[int, float]:
        return {i: m[measure] for i, m in self.repeats.items() if measure in m}

    def spread(self, measure: str) -> Spread | None:
        values = self.values(measure)
        return Spread.of(values.values()) if values else None

    def ratio(self, other: Series | None, measure: str) -> Spread | None:
        """This series over another, repeat by repeat."""
        if other is None or other is self:
            return None
        return paired_ratios(self.values(measure), other.values(measure))


def collect(records: Iterable[Record]) -> list[Series]:
    """The series of all measurements, by workload, in the order in which they first came.

    A file of several runs: repeats of the same case count on, run after run, so that ratios are
    taken within a run.
    """
    series: dict[tuple[Any, ...], Series] = {}
    for run, what, record in by_run(records):
        if what != "measurement":
            continue
        keys = ("family", "x", "workload", "rule", "kind", "mode", "tenants")
        try:
            identity = tuple(record[k] for k in keys)
            repeat, measures = int(record["repeat"]), dict(record["measures"])
        except (KeyError, TypeError, ValueError) as error:
            raise PedroError(f"a measurement lacks or garbles {error}") from None
        found = series.setdefault(identity, Series(*identity))
        number = run * 1_000_000 + repeat
        found.repeats[number] = measures
        if "fairness" in record:
            found.fairness[number] = record["fairness"]
    order = list(dict.fromkeys(s.asked for s in series.values()))
    return sorted(series.values(), key=lambda s: order.index(s.asked))


def base_of(series: Series, others: Sequence[Series]) -> Series | None:
    """Base on the same workload in the same mode."""
    return _find(others, series, kind="base", mode=series.mode)


def lora_of(series: Series, others: Sequence[Series]) -> Series | None:
    """LoRA on the same workload with as many tenants; in the same mode where there is one."""
    if series.kind in ("lora", "base", "plain"):
        return None
    wanted = {"kind": "lora", "tenants": series.tenants}
    return _find(others, series, **wanted, mode=series.mode) or _find(others, series, **wanted)


def single_of(series: Series, others: Sequence[Series]) -> Series | None:
    """The same engine on the same workload with one tenant."""
    if series.tenants < 2:
        return None
    return _find(others, series, kind=series.kind, mode=series.mode, tenants=1)


def _find(others: Sequence[Series], like: Series, **wanted: Any) -> Series | None:
    for other in others:
        if other.asked == like.asked and all(getattr(other, k) == v for k, v in wanted.items()):
            return other
    return None


@dataclass(frozen=True)
class BreakEven:
    """PEDRO (`mine`) against LoRA (`other`) at one prompt length: TTFT and ITL of each repeat."""

    prompt_tokens: int
    modes: tuple[str, str]
    mine: tuple[Latency, ...]
    other: tuple[Latency, ...]

    @property
    def medians(self) -> tuple[Latency, Latency]:
        mine, other = (
            Latency(statistics.median(x.ttft for x in each), statistics.median(x.itl for x in each))
            for each in (self.mine, self.other)
        )
        return mine, other

    @property
    def tokens(self) -> int | None:
        """Output length from which PEDRO is faster; None if never."""
        return break_even(*self.medians)

    @property
    def by_repeat(self) -> list[int | None]:
        return [break_even(a, b) for a, b in zip(self.mine, self.other, strict=True)]


def break_evens(all_series: Sequence[Series]) -> list[BreakEven]:
    """PEDRO against LoRA by prompt length; PEDRO in each mode that was measured."""
    result = []
    for s in all_series:
        lora = lora_of(s, all_series)
        if s.family != "break-even" or s.kind != "pedro" or lora is None:
            continue
        both = [i for i in s.repeats if i in lora.repeats]
        mine, other = (
            tuple(
                Latency(m["ttft_mean_ms"], m["itl_mean_ms"]) for m in map(x.repeats.get, both) if m
            )
            for x in (s, lora)
        )
        if both:
            result.append(BreakEven(int(s.x), (s.mode, lora.mode), mine, other))
    return result
