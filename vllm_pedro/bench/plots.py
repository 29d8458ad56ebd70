"""PNG plots of results. Readable in grey: series differ in marker, line and hatch, not in hue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..errors import PedroError
from .cases import engine_label
from .figures import Spread
from .tables import ITL, SPEED, Series, single_of

LOOKS: Final = {
    "base": {"color": "0.0", "linestyle": "-", "marker": "o"},
    "pedro": {"color": "0.35", "linestyle": "--", "marker": "s"},
    "static": {"color": "0.5", "linestyle": "-.", "marker": "D"},
    "lora": {"color": "0.6", "linestyle": ":", "marker": "^"},
}
HATCHES: Final = {"pedro": "//", "static": "xx", "lora": ".."}
LEGEND: Final = "median; whiskers: lowest and highest repeat"
BARS: Final = ("decode", "overhead", "prefill", "mixed", "paper", "beam", "trace", "serving")
"""The families whose workloads stand on no axis."""


def check_plots() -> None:
    """Say that matplotlib is missing: before an hour of measuring, not after it.

    Raises:
        PedroError: It is.
    """
    if find_spec("matplotlib") is None:
        raise PedroError(
            "plots need matplotlib: pip install 'vllm-pedro[bench]', or use --no-plots"
        )


def draw_all(all_series: Sequence[Series], folder: Path) -> list[tuple[str, Path]]:
    """Draw what the results have data for; title and file of each plot.

    Raises:
        PedroError: matplotlib is not installed.
    """
    check_plots()
    own = [s for s in all_series if s.tenants in (0, int(s.x))]  # not those of one tenant beside
    drawn = []
    for title, name, figure in (
        ("Throughput", "throughput.png", draw_bars(all_series)),
        (
            "Throughput over tenants",
            "tenants.png",
            draw_lines(
                [s for s in own if s.family == "tenants"],
                lambda s: s.ratio(single_of(s, all_series), SPEED),
                "output tokens/s ÷ the same by one tenant",
                joined=False,  # lengths differ
            ),
        ),
        (
            "Inter-token latency over concurrency",
            "concurrency.png",
            draw_lines(
                [s for s in all_series if s.family == "concurrency"],
                lambda s: s.spread(ITL),
                "mean inter-token latency, ms",
            ),
        ),
        (
            "End-to-end latency over prompt length",
            "break-even.png",
            draw_lines(
                [s for s in all_series if s.family == "break-even"],
                lambda s: s.spread("latency_mean_ms"),
                "mean end-to-end latency, ms",
            ),
        ),
    ):
        if figure is not None:
            # Without the date, so that the same results give the same file.
            figure.savefig(folder / name, dpi=120, metadata={"Software": None})
            drawn.append((title, folder / name))
    return drawn


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _errors(spreads: Sequence[Spread]) -> list[list[float]]:
    return [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]


def draw_bars(all_series: Sequence[Series]) -> Any:
    """Output tokens per second of each case; None where there are none."""
    chosen = [(s, spread) for s in all_series if s.family in BARS and (spread := s.spread(SPEED))]
    if not chosen:
        return None
    workloads = {s.workload for s, _ in chosen}
    figure, axes = _figure(8, 0.6 + 0.34 * (len(chosen) + len(workloads)))
    position, ticks, previous = -0.5, {}, ""
    for s, spread in chosen:
        if s.workload != previous:
            position += 1.2
            axes.text(0, position - 0.05, f" {s.workload}", fontweight="bold", va="center")
            previous = s.workload
        position += 1
        ticks[position] = s.label
        look = {"color": "0.85", "edgecolor": "0.0", "hatch": HATCHES.get(s.kind, "")}
        errors = _errors([spread])
        axes.barh(position, spread.median, height=0.8, xerr=errors, capsize=3, **look)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(position + 0.8, 0)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"output tokens/s ({LEGEND})")
    return figure


def draw_lines(
    all_series: Sequence[Series],
    value: Callable[[Series], Spread | None],
    label: str,
    joined: bool = True,
) -> Any:
    """A value of each engine over the workloads, in order; None where there is one workload."""
    places = sorted({(s.x, s.workload) for s in all_series})
    if len(places) < 2:
        return None
    figure, axes = _figure(8, 4.2)
    for kind, mode in dict.fromkeys((s.kind, s.mode) for s in all_series):
        points = sorted(
            (places.index((s.x, s.workload)), spread)
            for s in all_series
            if (s.kind, s.mode) == (kind, mode) and (spread := value(s))
        )
        if points:
            xs, spreads = zip(*points, strict=True)
            look = dict(LOOKS[kind])
            if mode == "eager":
                look["markerfacecolor"] = "none"
            if not joined:
                look["linestyle"] = ""
            axes.errorbar(
                xs,
                [s.median for s in spreads],
                yerr=_errors(spreads),
                capsize=3,
                label=engine_label(f"{kind}-{mode}"),
                **look,
            )
    axes.set_xticks(range(len(places)), [name.replace(", ", "\n") for _, name in places])
    axes.tick_params(axis="x", labelsize="small")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    axes.grid(axis="y", color="0.9")
    axes.legend(title=LEGEND, fontsize="small")
    return figure
