"""Tables and the plot from what `gpu_check.py` has written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vllm_pedro.bench import tables

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """The lines that are whole; the last one may not be, where a run was ended."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def latest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Each part's rows of the last start that finished it, else of the last that tried."""
    by_part: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        if "part" in row:
            by_part.setdefault(row["part"], {}).setdefault(row["start"], []).append(row)
    found = {}
    for part, starts in by_part.items():
        done = [n for n, each in starts.items() if any(r.get("done") for r in each)]
        found[part] = [r for r in starts[max(done or starts)] if not r.get("done")]
    return found


def table(headers: Iterable[str], lines: Iterable[Iterable[Any]]) -> str:
    """Markdown, of whatever values."""
    return tables.table(list(headers), [[show(value) for value in line] for line in lines]) + "\n"


def show(value: Any) -> str:
    """Three digits, lists by their parts, nothing for None."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return "; ".join(map(show, value))
    text = "" if value is None else str(value)
    return text.replace("|", "/").replace("\n", " ")


def plain(rows: list[Row]) -> str:
    """All rows with all that they have in common or not, a key a column."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("start", "part")))
    return table(keys, ([row.get(key) for key in keys] for row in rows))


def beside_base(case: tuple[str, ...], value: str, unit: str) -> Callable[[list[Row]], str]:
    """A line a case, two columns an engine: the value, and over base."""

    def draw(rows: list[Row]) -> str:
        engines = list(dict.fromkeys(row["engine"] for row in rows if "engine" in row))
        headers = list(case)
        for engine in engines:
            headers += [f"{engine}, {unit}"] if engine == "base" else [engine, "over base"]
        lines: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in rows:
            if value in row:
                place = lines.setdefault(tuple(row.get(key) for key in case), {})
                # Groups of engines that did not fit together have a base each; the first is shown.
                place.setdefault(row["engine"], row)
        drawn = []
        for key, here in lines.items():
            line: list[Any] = list(key)
            for engine in engines:
                row = here.get(engine, {})
                line.append(row.get(value))
                if engine != "base":
                    ratio = row.get("over base")
                    line.append(None if ratio is None else f"{ratio:.3f}")
            drawn.append([*line, *_noise(list(here.values()))])
        text = table([*headers, "rounds", "noise"], drawn)
        return text + errors(rows)

    return draw


def _noise(rows: list[Row]) -> tuple[Any, str]:
    known = [row["noise"] for row in rows if row["noise"] is not None]
    said = f"{max(known):.4f}" if known else "too few rounds"
    enough = all(row["enough"] for row in rows) or not known
    return max(row["rounds"] for row in rows), said + ("" if enough else ", above 0.005")


def errors(rows: list[Row]) -> str:
    """What failed, a line each."""
    lines = [
        f"- {row.get('engine', 'this part')}: {show(row['error'])[-600:]}"
        for row in rows
        if "error" in row
    ]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def kernels(rows: list[Row]) -> str:
    """The kernels of each number of sequences whose time differs most from base's."""
    text = errors(rows)
    for sequences in dict.fromkeys(row["sequences"] for row in rows if "kernels" in row):
        here = {r["engine"]: r for r in rows if r.get("sequences") == sequences}
        times = {
            engine: {name: us for name, us, _ in row["kernels"]} for engine, row in here.items()
        }
        names = {name for mine in times.values() for name in mine}
        spread = {n: [mine.get(n, 0.0) for mine in times.values()] for n in names}
        order = sorted(names, key=lambda n: min(spread[n]) - max(spread[n]))[:12]
        text += f"\n{sequences} sequences:\n\n"
        lines = [[name[:90], *spread[name]] for name in order]
        lines.append(["all", *(row["all"] for row in here.values())])
        text += table(["µs a layer and step", *here], lines)
    return text


DECODE = beside_base(("sequences", "tenants"), "step ms", "ms a step")
SECTIONS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "decode": ("Decode; over base: tokens/s", DECODE),
    "lora": ("Decode, vLLM's LoRA; over base: tokens/s", DECODE),
    "many": ("Decode, 1,024 sequences; over base: tokens/s", DECODE),
    "profile": ("Where a decode step's time goes", kernels),
    "first": (
        "First tokens; over base: time",
        beside_base(("state", "prompts", "prompt tokens", "tenants"), "ms", "ms"),
    ),
    "running": (
        "Longest gaps (99 %) between tokens of running rows; over base: time",
        beside_base(("sequences", "arrivals a second"), "gap p99 ms", "ms"),
    ),
    "memory": ("KV blocks at the same gpu_memory_utilization", plain),
    "bandwidth": ("Operators beside a copy", plain),
    "operators": ("Operators equal the reference", plain),
    "exactness": ("Exactness, float32", plain),
    "fuzz": ("Random schedules", plain),
    "model": ("bfloat16 answers, judged by the float32 reference", plain),
    "serve": ("A server under mixed traffic", plain),
}


def render(folder: Path) -> str:
    """Write `results.md` and the plot beside `results.jsonl`; the former is returned."""
    rows = read(folder / "results.jsonl")
    starts, parts = {r["start"]: r for r in rows if "card" in r}, latest(rows)
    text = "# Results\n"
    used = sorted({r["start"] for each in parts.values() for r in each})
    for number in used:
        start = starts[number]
        versions = ", ".join(f"{name} {value}" for name, value in start["versions"].items())
        text += (
            f"\n{number}. {start['card']}; {versions}; operators: {start['operators']}; revision "
            f"{start['revision']}; {start['time']}; `{start['command']}`"
        )
    for part, (title, draw) in SECTIONS.items():
        if part in parts:
            numbers = ", ".join(str(n) for n in sorted({r["start"] for r in parts[part]}))
            text += f"\n\n## {title}\n\n`{part}`, start {numbers}\n\n{draw(parts[part])}".rstrip()
    text += "\n"
    (folder / "results.md").write_text(text)
    points = [r for part in ("decode", "lora") for r in parts.get(part, []) if "over base" in r]
    if points:
        most = max(row["sequences"] for row in points)
        card = starts[used[-1]]["card"]
        drawn = {"base", "base again", "PEDRO, five modules"}
        points = [r for r in points if r["sequences"] == most and r["engine"] not in drawn]
        plot(points, f"Decode, {most} sequences, {card}", folder / "decode_by_tenants.svg")
    return text


def plot(rows: list[Row], title: str, file: Path) -> None:
    """Tokens/s over base by tenants, a line an engine, where matplotlib is installed.

    Args:
        rows: Have `engine`, `sequences`, `tenants` and `over base`.
    """
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "gpu_check"  # the same plot, the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axes.axhline(1.0, color="#888888", linewidth=1, linestyle="--")
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    colours = ("#1f77b4", "#d62728", "#ff7f0e", "#2ca02c", "#9467bd")
    for engine, colour in zip(engines, colours, strict=False):
        mine = [(r["tenants"], r["over base"]) for r in rows if r["engine"] == engine]
        axes.plot(*zip(*mine, strict=True), marker="o", color=colour, label=engine)
        for tenants, ratio in mine:
            axes.annotate(
                f"{ratio:.2f}",
                (tenants, ratio),
                textcoords="offset points",
                xytext=(0, 6),
                ha="center",
                fontsize=8,
                color=colour,
            )
    ticks = sorted({row["tenants"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(0, max(1.15, *(1.1 * row["over base"] for row in rows)))
    axes.set_xlabel("tenants")
    axes.set_ylabel("tokens/s over base")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="center right", bbox_to_anchor=(1.0, 0.62))
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None} if file.suffix == ".svg" else None
    figure.savefig(file, dpi=150, metadata=metadata)
    plt.close(figure)


if __name__ == "__main__":  # python benchmarks/gpu_tables.py READING PLOT
    reading = json.loads(Path(sys.argv[1]).read_text())
    decode = [row for row in reading["decode"] if row["sequences"] == 256]
    plot(decode, f"Decode, 256 sequences, {reading['card']}", Path(sys.argv[2]))
