"""The report: what was measured, on what, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import PedroError
from .figures import Spread
from .plots import draw_all
from .results import by_run
from .tables import (
    SHORT,
    Record,
    Series,
    break_even_table,
    collect,
    engine_table,
    fairness_table,
    load_table,
    series_table,
    summary_table,
)

CPU_NOTE = (
    "On the CPU vLLM runs an engine with LoRA eagerly and with kernels in plain torch that copy "
    "each row's weights, so LoRA's figures here say nothing about a GPU. Compare LoRA with eager "
    "base and eager PEDRO, which do without the compiler too."
)


def conditions(records: Sequence[Record]) -> list[str]:
    """What was run, on what, and how busy it was: a list in Markdown for each run."""

    def listed(values: dict[str, object]) -> str:
        return ", ".join(f"{k} {v}" for k, v in values.items())

    def load(record: Record) -> str:
        return ", ".join(f"{v:.1f}" for v in record.get("load_average") or ()) or "unknown"

    lines: list[str] = []
    cores, runs = None, sum(r["record"] == "run" for r in records)
    for run, what, record in by_run(records):
        if what == "run":
            host = record["machine"]
            cores = host["cores"]
            device = host.get("gpu", f"{host['cpu']}, {cores} cores")
            memory = f", {host['memory_gib']} GiB" if host.get("memory_gib") else ""
            lines += [
                f"{f'run {run}: ' if runs > 1 else ''}`{record['command']}`, {record['time']}",
                f"{device}{memory}, {host['system']}; {listed(record['versions'])}",
                *([listed(record["settings"])] if record["settings"] else []),
                f"load average before: {load(record)}",
            ]
        elif what == "settings":
            lines.append(f"{record['model']}; {listed(record['settings'])}")
        elif what == "end":
            lines.append(f"load average after: {load(record)}")
    loads = [r["load_average"][0] for r in records if r.get("load_average")]
    if loads and cores:
        lines.append(
            f"load average during the run (last minute's, after each measurement): "
            f"{Spread.of(loads).format(1)} on {cores} cores. The benchmark itself accounts for "
            "about as many as it has threads; what is above that is other programs, and makes "
            "figures worse and their spread wider."
        )
    return [f"- {line}" for line in lines]


def runs_on_cpu(records: Sequence[Record]) -> bool:
    return any(r.get("cpu") for r in records if r["record"] == "engine")


def write_report(records: Sequence[Record], folder: Path, plots: bool = True) -> list[Path]:
    """Write `report.md`, and PNGs beside it where there is something to plot; the files.

    Raises:
        PedroError: There are no measurements, or matplotlib is missing.
    """
    all_series = collect(records)
    if not all_series:
        raise PedroError("the results hold no measurement")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(all_series, folder) if plots else []
    path = folder / "report.md"
    path.write_text(markdown(records, all_series, pictures))
    return [path, *(picture for _, picture in pictures)]


def markdown(
    records: Sequence[Record],
    all_series: Sequence[Series],
    pictures: Sequence[tuple[str, Path]] = (),
) -> str:
    """The report's text."""
    parts = [
        "## Conditions",
        "\n".join(conditions(records)),
        "Each figure is the median over the repeats, lowest and highest in brackets. Cases of a "
        "workload ran one after the other in each repeat, in turned order every other time; ratios "
        "are taken within a repeat. TTFT and ITL (time to first token, inter-token latency): "
        "mean / median / 99th percentile; their ratios are of the means.",
    ]
    if runs_on_cpu(records):
        parts.append(CPU_NOTE)
    if summary := summary_table(all_series):
        parts += ["## Ratios of output tokens/s, and of the time to the first token", summary]
    parts += ["## Everything measured", series_table(all_series), "Workloads:"]
    rules = {s.workload: s.rule for s in all_series}
    parts.append("\n".join(f"- {name}: {rule}" for name, rule in rules.items()))
    for title, picture in pictures:
        parts.append(f"![{title}]({picture.name})")
    sections = (
        (
            "## From which output length PEDRO beats LoRA",
            break_even_table(all_series),
            "One request at a time; end-to-end latency as TTFT + (n - 1) × ITL.",
        ),
        (
            "## Memory and start-up",
            engine_table(records),
            "Peak memory is the highest resident set of the engine's process. On the CPU the KV "
            "cache's size is set by hand, so nothing is taken from it; the last column says how "
            "many blocks would fit where adapter slots and vectors are, and how many there are.",
        ),
        (
            "## Loading an adapter",
            load_table(records),
            "One request of 32 + 1 tokens at a time, by tenants that the engine has not seen.",
        ),
        (
            "## Fairness",
            fairness_table(all_series),
            "Over the tenants of a run. Jain's index is 1 where all tenants see the same speed.",
        ),
    )
    for title, text, note in sections:
        if text:
            parts += [title, text, note]
    return "\n\n".join(parts) + "\n"


def short_report(records: Sequence[Record]) -> str:
    """What a terminal shows."""
    all_series = collect(records)
    parts = [series_table(all_series, SHORT), break_even_table(all_series)]
    parts.append(
        "Median over the repeats (lowest-highest). '÷ base' is to base in the same mode; ratios "
        "are taken within a repeat."
    )
    if runs_on_cpu(records):
        parts.append(CPU_NOTE)
    return "\n\n".join(filter(None, parts))
