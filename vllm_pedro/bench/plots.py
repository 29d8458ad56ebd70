"""PNG plots of results. Readable in grey: series differ in marker, line and hatch, not in hue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from ..errors import PedroError
from .cases import LABELS
from .figures import Latency, Spread
from .series import Series, break_evens, single_of

STYLES: Final = {
    ("base", "compiled"): {"color": "0.0", "marker": "o", "linestyle": "-"},
    ("pedro", "compiled"): {"color": "0.35", "marker": "s", "linestyle": "--"},
    ("static", "compiled"): {"color": "0.5", "marker": "D", "linestyle": "-."},
    ("lora", "compiled"): {"color": "0.6", "marker": "^", "linestyle": ":"},
    ("base", "eager"): {"color": "0.0", "marker": "x", "linestyle": "-"},
    ("pedro", "eager"): {"color": "0.35", "marker": "+", "linestyle": "--"},
    ("static", "eager"): {"color": "0.5", "marker": "*", "linestyle": "-."},
    ("lora", "eager"): {"color": "0.6", "marker": "v", "linestyle": ":"},
}
LEGEND: Final = "median; whiskers: lowest and highest repeat"
HATCHES: Final = {"plain": "", "base": "", "pedro": "//", "static": "xx", "lora": ".."}


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
    """Draw what the results have data for.

    Returns:
        Title and file of each plot.

    Raises:
        PedroError: matplotlib is not installed.
    """
    check_plots()
    import matplotlib

    matplotlib.use("Agg")
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


def _errors(spreads: Sequence[Any]) -> list[list[float]]:
    return [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]


def draw_throughput(all_series: Sequence[Series]) -> Any:
    """Bars: output tokens per second of each case of the plain workloads."""
    families = ("decode", "overhead", "prefill", "mixed", "paper", "beam", "trace", "serving")
    chosen = [s for s in all_series if s.family in families and s.spread("output_tokens_per_s")]
    if not chosen:
        return None
    workloads = list(dict.fromkeys(s.workload for s in chosen))
    figure, axes = _figure(8, 0.6 + 0.34 * (len(chosen) + len(workloads)))
    position, ticks, labels = 0.0, [], []
    for workload in workloads:
        position += 0.7
        axes.text(0, position - 0.05, f" {workload}", fontweight="bold", va="center")
        for s in (s for s in chosen if s.workload == workload):
            position += 1
            spread = s.spread("output_tokens_per_s")
            assert spread is not None
            axes.barh(
                position,
                spread.median,
                height=0.8,
                color="0.85",
                edgecolor="0.0",
                hatch=HATCHES[s.kind],
                xerr=_errors([spread]),
                capsize=3,
            )
            ticks.append(position)
            labels.append(s.label)
        position += 0.5
    axes.set_yticks(ticks, labels)
    axes.set_ylim(position + 0.3, 0)
    axes.set_xlim(left=0)
    axes.set_xlabel("output tokens/s (median; whiskers: lowest and highest repeat)")
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
    for key, style in STYLES.items():
        for axes in (speeds, ratios):
            label = True
            for lengths in kinds:
                points = []
                for s in own:
                    if (s.kind, s.mode) != key or _lengths(s) != lengths:
                        continue
                    spread = s.spread("output_tokens_per_s")
                    if axes is ratios:
                        spread = s.ratio(single_of(s, all_series), "output_tokens_per_s")
                    if spread is not None:
                        points.append((float(places.index((int(s.x), lengths))), spread))
                _error_bars(axes, sorted(points, key=lambda p: p[0]), style, key, label)
                label = label and not points
    ticks = [f"{count:,}\n{lengths}" for count, lengths in places]
    for axes in (speeds, ratios):
        axes.set_xticks(range(len(places)), ticks)
        axes.set_xlabel("tenants (not to scale); prompt + output tokens of a request")
    speeds.set_ylabel("output tokens/s")
    ratios.axhline(1, color="0.8", linewidth=0.8)
    ratios.set_xlim(speeds.get_xlim())
    ratios.set_ylabel("÷ the same requests by one tenant")
    for axes in (speeds, ratios):
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.grid(axis="y", color="0.9")
    figure.legend(
        *speeds.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=6,
        title=LEGEND,
        fontsize="small",
    )
    return figure


def _lengths(series: Series) -> str:
    """A workload's "prompt + output" tokens, from its rule."""
    found = re.search(r"of (\d+ \+ \d+) tokens", series.rule)
    return found[1] if found else ""


def _error_bars(
    axes: Any, points: Sequence[tuple[float, Any]], style: Any, key: Any, label: bool = True
) -> None:
    if points:
        xs, spreads = [p[0] for p in points], [p[1] for p in points]
        axes.errorbar(
            xs,
            [s.median for s in spreads],
            yerr=_errors(spreads),
            capsize=3,
            label=f"{LABELS[key[0]]}, {key[1]}" if label else None,
            **style,
        )


def _finish(figure: Any, axes: Any) -> Any:
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9")
    axes.legend(title=LEGEND, fontsize="small")
    return figure


def draw_concurrency(all_series: Sequence[Series]) -> Any:
    """Lines: mean inter-token latency over the number of requests at once."""
    chosen = [s for s in all_series if s.family == "concurrency"]
    if len({s.x for s in chosen}) < 2:
        return None
    figure, axes = _figure(7, 4.2)
    for key, style in STYLES.items():
        own = sorted((s for s in chosen if (s.kind, s.mode) == key), key=lambda s: s.x)
        spreads = [(s.x, s.spread("itl_mean_ms")) for s in own]
        _error_bars(axes, [(x, s) for x, s in spreads if s is not None], style, key)
    axes.set_xlim(left=0)
    axes.set_xlabel("requests at once")
    axes.set_ylabel("mean inter-token latency, ms")
    return _finish(figure, axes)


def draw_break_even(all_series: Sequence[Series]) -> Any:
    """Lines: end-to-end latency over output length, PEDRO and LoRA, a panel a prompt length."""
    found = break_evens(all_series)
    lengths = sorted({b.prompt_tokens for b in found})
    if not lengths:
        return None
    most = 64
    figure, panels = _figure(
        3.2 * len(lengths) + 0.6, 3.8, len(lengths), sharey=True, squeeze=False
    )
    for axes, length in zip(panels[0], lengths, strict=True):
        for number, b in enumerate(b for b in found if b.prompt_tokens == length):
            _latency_line(axes, b.mine, most, ("pedro", b.modes[0]))
            if number == 0:
                _latency_line(axes, b.other, most, ("lora", b.modes[1]))
            if b.tokens is not None and 1 < b.tokens < most:
                axes.axvline(b.tokens, color="0.5", linewidth=0.8)
                axes.text(b.tokens, 0, f" {b.tokens}", va="bottom", fontsize="small")
        axes.set_title(f"prompt of {length} tokens", fontsize="medium")
        axes.set_xlim(0, most)
        axes.set_xlabel("output tokens")
        axes.grid(axis="y", color="0.9")
    panels[0][0].set_ylim(bottom=0)  # all share it, so not before all are drawn
    panels[0][0].set_ylabel("end-to-end latency, s")
    panels[0][0].legend(fontsize="small", title="median; band: repeats", title_fontsize="small")
    return figure


def _latency_line(axes: Any, repeats: Sequence[Latency], most: int, key: tuple[str, str]) -> None:
    xs = list(range(1, most + 1))
    spreads = [Spread.of(latency.of(x) / 1e3 for latency in repeats) for x in xs]
    style = STYLES[key]
    axes.plot(
        xs,
        [s.median for s in spreads],
        label=f"{LABELS[key[0]]}, {key[1]}",
        markevery=12,
        **style,
    )
    axes.fill_between(
        xs, [s.low for s in spreads], [s.high for s in spreads], color=style["color"], alpha=0.2
    )
