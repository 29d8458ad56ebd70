"""PNG plots of results. Readable in grey: series differ in marker, line and hatch, not in hue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..errors import PedroError
from .cases import LABELS
from .figures import Spread
from .series import Series, break_evens, single_of

LOOKS: Final = {
    "base": ("0.0", "-", "ox", ""),
    "pedro": ("0.35", "--", "s+", "//"),
    "static": ("0.5", "-.", "D*", "xx"),
    "lora": ("0.6", ":", "^v", ".."),
}
"""Grey, line, markers of compiled and eager, hatch."""

STYLES: Final = {
    (kind, mode): {"color": grey, "linestyle": line, "marker": marker}
    for place, mode in enumerate(("compiled", "eager"))
    for kind, (grey, line, markers, _) in LOOKS.items()
    for marker in markers[place]
}
LEGEND: Final = "median; whiskers: lowest and highest repeat"
SPEED: Final = "output_tokens_per_s"
Points = list[tuple[float, Spread | None]]


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
    drawn = []
    for title, name, draw in (
        ("Throughput", "throughput.png", draw_throughput),
        ("Throughput over tenants", "tenants.png", draw_tenants),
        ("Inter-token latency over concurrency", "concurrency.png", draw_concurrency),
        ("End-to-end latency over output length", "break-even.png", draw_break_even),
    ):
        figure = draw(all_series)
        if figure is not None:
            # Without the date, so that the same results give the same file.
            figure.savefig(folder / name, dpi=120, metadata={"Software": None})
            drawn.append((title, folder / name))
    return drawn


def _figure(width: float, height: float, columns: int = 1, **keywords: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **keywords)


def _name(kind: str, mode: str) -> str:
    return f"{LABELS[kind]}, {mode}"


def _errors(spreads: Sequence[Spread]) -> list[list[float]]:
    return [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]


def _line(axes: Any, points: Points, key: tuple[str, str], label: str | None) -> bool:
    """A line with whiskers through what was measured; whether there was anything."""
    found = sorted((x, s) for x, s in points if s is not None)
    if found:
        spreads = [s for _, s in found]
        xs, ys = [x for x, _ in found], [s.median for s in spreads]
        axes.errorbar(xs, ys, yerr=_errors(spreads), capsize=3, label=label, **STYLES[key])
    return bool(found)


def draw_throughput(all_series: Sequence[Series]) -> Any:
    """Bars: output tokens per second of each case of the plain workloads."""
    families = ("decode", "overhead", "prefill", "mixed", "paper", "beam", "trace", "serving")
    chosen = [(s, s.spread(SPEED)) for s in all_series if s.family in families]
    workloads = list(dict.fromkeys(s.workload for s, _ in chosen))
    if not chosen:
        return None
    figure, axes = _figure(8, 0.6 + 0.34 * (len(chosen) + len(workloads)))
    position, ticks, previous = -0.5, {}, ""
    for s, spread in chosen:
        if s.workload != previous:
            position += 1.2
            axes.text(0, position - 0.05, f" {s.workload}", fontweight="bold", va="center")
            previous = s.workload
        position += 1
        ticks[position] = s.label
        if spread is not None:
            look = {"color": "0.85", "edgecolor": "0.0", "hatch": LOOKS.get(s.kind, [""])[-1]}
            errors = _errors([spread])
            axes.barh(position, spread.median, height=0.8, xerr=errors, capsize=3, **look)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_ylim(position + 0.8, 0)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"output tokens/s ({LEGEND})")
    return figure


def draw_tenants(all_series: Sequence[Series]) -> Any:
    """Lines over the number of tenants: output tokens per second, and as a ratio to one tenant.

    Only requests of the same lengths are joined by a line: shorter ones yield fewer tokens a
    second, whoever asks.
    """
    # Each workload was also measured with one tenant; here belong the rows of its own x.
    own = [s for s in all_series if s.family == "tenants" and s.tenants in (0, int(s.x))]
    kinds = list(dict.fromkeys(_lengths(s) for s in own))
    places = sorted({(int(s.x), _lengths(s)) for s in own}, key=lambda p: (p[0], kinds.index(p[1])))
    if len(places) < 2:
        return None
    figure, (speeds, ratios) = _figure(11, 4.2, 2)
    for axes in (speeds, ratios):
        for key in STYLES:
            label: str | None = _name(*key)
            for lengths in kinds:
                points: Points = []
                for s in (s for s in own if (s.kind, s.mode, _lengths(s)) == (*key, lengths)):
                    single = single_of(s, all_series)
                    spread = s.spread(SPEED) if axes is speeds else s.ratio(single, SPEED)
                    points.append((float(places.index((int(s.x), lengths))), spread))
                if _line(axes, points, key, label):
                    label = None
        axes.set_xticks(range(len(places)), [f"{count:,}\n{lengths}" for count, lengths in places])
        axes.set_xlabel("tenants (not to scale); prompt + output tokens of a request")
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.grid(axis="y", color="0.9")
    speeds.set_ylabel("output tokens/s")
    ratios.axhline(1, color="0.8", linewidth=0.8)
    ratios.set_xlim(speeds.get_xlim())
    ratios.set_ylabel("÷ the same requests by one tenant")
    legend = {"loc": "outside lower center", "ncols": 6, "title": LEGEND, "fontsize": "small"}
    figure.legend(*speeds.get_legend_handles_labels(), **legend)
    return figure


def _lengths(series: Series) -> str:
    """A workload's "prompt + output" tokens, from its rule."""
    found = re.search(r"of (\d+ \+ \d+) tokens", series.rule)
    return found[1] if found else ""


def draw_concurrency(all_series: Sequence[Series]) -> Any:
    """Lines: mean inter-token latency over the number of requests at once."""
    chosen = [s for s in all_series if s.family == "concurrency"]
    if len({s.x for s in chosen}) < 2:
        return None
    figure, axes = _figure(7, 4.2)
    for key in STYLES:
        own = [(s.x, s.spread("itl_mean_ms")) for s in chosen if (s.kind, s.mode) == key]
        _line(axes, own, key, _name(*key))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests at once")
    axes.set_ylabel("mean inter-token latency, ms")
    axes.grid(axis="y", color="0.9")
    axes.legend(title=LEGEND, fontsize="small")
    return figure


def draw_break_even(all_series: Sequence[Series]) -> Any:
    """Lines: end-to-end latency over output length, PEDRO and LoRA, a panel a prompt length."""
    found = break_evens(all_series)
    lengths = sorted({b.prompt_tokens for b in found})
    if not lengths:
        return None
    xs = range(1, 65)
    width = 3.2 * len(lengths) + 0.6
    figure, panels = _figure(width, 3.8, len(lengths), sharey=True, squeeze=False)
    for axes, length in zip(panels[0], lengths, strict=True):
        lines = {}
        for b in (b for b in found if b.prompt_tokens == length):
            lines["pedro", b.modes[0]] = b.mine
            lines.setdefault(("lora", b.modes[1]), b.other)
            if b.tokens is not None and 1 < b.tokens < xs[-1]:
                axes.axvline(b.tokens, color="0.5", linewidth=0.8)
                axes.text(b.tokens, 0, f" {b.tokens}", va="bottom", fontsize="small")
        for key, repeats in lines.items():
            spreads = [Spread.of(repeat.of(x) / 1e3 for repeat in repeats) for x in xs]
            ys = [s.median for s in spreads]
            axes.plot(xs, ys, label=_name(*key), markevery=12, **STYLES[key])
            ends = [s.low for s in spreads], [s.high for s in spreads]
            axes.fill_between(xs, *ends, color=STYLES[key]["color"], alpha=0.2)
        axes.set_title(f"prompt of {length} tokens", fontsize="medium")
        axes.set_xlim(0, xs[-1])
        axes.set_xlabel("output tokens")
        axes.grid(axis="y", color="0.9")
    panels[0][0].set_ylim(bottom=0)  # all share it, so not before all are drawn
    panels[0][0].set_ylabel("end-to-end latency, s")
    panels[0][0].legend(fontsize="small", title="median; band: repeats", title_fontsize="small")
    return figure
