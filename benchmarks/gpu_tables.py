"""Tables from what `gpu_check.py` has written."""

from __future__ import annotations

import json
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
        lines: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in rows:
            if value in row:
                # Groups of engines that did not fit together have a base each; the first is shown.
                lines.setdefault(tuple(map(row.get, case)), {}).setdefault(row["engine"], row)
        engines = dict.fromkeys(row["engine"] for row in rows if "engine" in row)
        others = [engine for engine in engines if engine != "base"]
        headers = [*case, f"base, {unit}"]
        headers += [header for engine in others for header in (engine, "over base")]
        drawn = []
        for key, here in lines.items():
            line = [*key, here.get("base", {}).get(value)]
            for engine in others:
                ratio = here.get(engine, {}).get("over base")
                line += [here.get(engine, {}).get(value), ratio and f"{ratio:.3f}"]
            drawn.append([*line, *_noise(list(here.values()))])
        return table([*headers, "rounds", "noise"], drawn) + errors(rows)

    return draw


def _noise(rows: list[Row]) -> tuple[Any, str]:
    known = [row["noise"] for row in rows if row["noise"] is not None]
    said = f"{max(known):.4f}" if known else "too few rounds"
    enough = all(row["enough"] for row in rows) or not known
    return max(row["rounds"] for row in rows), said + ("" if enough else ", above 0.005")


def errors(rows: list[Row]) -> str:
    """What failed, a line each."""
    return "".join(
        f"\n- {row.get('engine', 'this part')}: {show(row['error'])[-600:]}\n"
        for row in rows
        if "error" in row
    )


def kernels(rows: list[Row]) -> str:
    """The kernels of each number of sequences whose time differs most from base's."""
    text = errors(rows)
    for sequences in dict.fromkeys(row["sequences"] for row in rows if "kernels" in row):
        here = {r["engine"]: r for r in rows if r.get("sequences") == sequences}
        times = [{name: us for name, us, _ in row["kernels"]} for row in here.values()]
        spread = {n: [mine.get(n, 0.0) for mine in times] for mine in times for n in mine}
        order = sorted(spread, key=lambda n: min(spread[n]) - max(spread[n]))[:12]
        lines = [[name[:90], *spread[name]] for name in order]
        lines.append(["all", *(row["all"] for row in here.values())])
        text += f"\n{sequences} sequences:\n\n" + table(["µs a layer and step", *here], lines)
    return text


DECODE = beside_base(("sequences", "tenants"), "step ms", "ms a step")
FIRST = beside_base(("state", "prompts", "prompt tokens", "tenants"), "ms", "ms")
RUNNING = beside_base(("sequences", "arrivals a second"), "gap p99 ms", "ms")
SECTIONS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "decode": ("Decode; over base: tokens/s", DECODE),
    "lora": ("Decode, vLLM's LoRA; over base: tokens/s", DECODE),
    "many": ("Decode, 1,024 sequences; over base: tokens/s", DECODE),
    "profile": ("Where a decode step's time goes", kernels),
    "first": ("First tokens; over base: time", FIRST),
    "running": ("Longest gaps (99 %) between tokens of running rows; over base: time", RUNNING),
    "memory": ("KV blocks at the same gpu_memory_utilization", plain),
    "bandwidth": ("Operators beside a copy", plain),
    "operators": ("Operators equal the reference", plain),
    "exactness": ("Exactness, float32", plain),
    "fuzz": ("Random schedules", plain),
    "model": ("bfloat16 answers, judged by the float32 reference", plain),
    "serve": ("A server under mixed traffic", plain),
}


def render(folder: Path) -> str:
    """Write `results.md` beside `results.jsonl`."""
    rows = read(folder / "results.jsonl")
    starts, parts = {r["start"]: r for r in rows if "card" in r}, latest(rows)
    text = "# Results\n"
    for number in sorted({r["start"] for each in parts.values() for r in each}):
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
    return text
