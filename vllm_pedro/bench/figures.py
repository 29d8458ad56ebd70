"""From times to measures, from measures to ratios. All arithmetic of the benchmarks is here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .driver import Timing


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes of repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = list(values)
        return cls(statistics.median(found), min(found), max(found))

    def format(self, digits: int = 2) -> str:
        """`median (low-high)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def paired_ratios(mine: Mapping[int, float], other: Mapping[int, float]) -> Spread | None:
    """Ratios of the repeats that both have; None if there are none.

    Both maps go from repeat to value. Values of the same repeat were measured one after the other,
    so a machine that slows down over the run does not show in their ratio.
    """
    ratios = [mine[i] / other[i] for i in mine if i in other and other[i] > 0]
    return Spread.of(ratios) if ratios else None


def measure(timings: Sequence[Timing]) -> dict[str, float]:
    """`seconds`, `output_tokens_per_s`, and in ms TTFT, ITL and end-to-end latency of one run.

    Throughput counts from the first request sent to the last token. Inter-token latencies are
    pooled over all requests; a run of one-token answers has none, and their keys are left out.
    """
    seconds = max(t.tokens[-1] for t in timings) - min(t.sent for t in timings)
    result = {
        "seconds": seconds,
        "output_tokens_per_s": sum(len(t.tokens) for t in timings) / seconds,
        "latency_mean_ms": 1e3 * statistics.fmean(t.latency for t in timings),
    }
    ttfts, gaps = [t.ttft for t in timings], [gap for t in timings for gap in t.gaps]
    for name, values in (("ttft", ttfts), ("itl", gaps)):
        if values:
            result[f"{name}_mean_ms"] = 1e3 * statistics.fmean(values)
            result[f"{name}_median_ms"] = 1e3 * statistics.median(values)
            result[f"{name}_p99_ms"] = float(1e3 * np.percentile(values, 99))
    return result


def per_tenant(timings: Sequence[Timing]) -> dict[int | None, dict[str, float]]:
    """For each tenant: requests, mean TTFT, mean ITL, and output tokens per second of its requests.

    A tenant's tokens per second is the mean over its requests of tokens by end-to-end time: what
    one of its users sees.
    """
    groups: dict[int | None, list[Timing]] = {}
    for timing in timings:
        groups.setdefault(timing.tenant, []).append(timing)
    result: dict[int | None, dict[str, float]] = {}
    for tenant, own in groups.items():
        result[tenant] = {"requests": float(len(own))}
        result[tenant]["ttft_mean_ms"] = 1e3 * statistics.fmean(t.ttft for t in own)
        result[tenant]["tokens_per_s"] = statistics.fmean(len(t.tokens) / t.latency for t in own)
        if gaps := [gap for t in own for gap in t.gaps]:
            result[tenant]["itl_mean_ms"] = 1e3 * statistics.fmean(gaps)
    return result


def fairness(tenants: Mapping[Any, Mapping[str, float]]) -> dict[str, float]:
    """How evenly tenants are served.

    `jain_tokens_per_s` is Jain's index of what their users see: 1 where all get the same, 1/n where
    one of n gets all. `worst_over_best_ttft` and `worst_over_best_itl` are ratios of means.
    """
    speeds = [t["tokens_per_s"] for t in tenants.values()]
    jain = sum(speeds) ** 2 / (len(speeds) * sum(v * v for v in speeds))
    result = {"jain_tokens_per_s": jain}
    for name in ("ttft", "itl"):
        means = [t[f"{name}_mean_ms"] for t in tenants.values() if f"{name}_mean_ms" in t]
        if means and min(means) > 0:
            result[f"worst_over_best_{name}"] = max(means) / min(means)
    return result


def break_even(mine: tuple[float, float], other: tuple[float, float]) -> int | None:
    """The output length from which on `mine` is faster than `other`; None if never.

    Both are TTFT and ITL; n tokens take `ttft + (n - 1) * itl`. 1 means always. Where `mine` is
    slower per token it can only win short answers, and there is no length from which on it wins, so
    the answer is None too.
    """
    late, gain = mine[0] - other[0], other[1] - mine[1]
    if gain < 0 or (gain == 0 and late >= 0):
        return None
    return 1 if late < 0 else math.floor(late / gain) + 2
