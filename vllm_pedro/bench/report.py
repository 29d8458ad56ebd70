"""From records to a report: one table of everything measured, and what belongs beside it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PedroError
from .engines import LABELS, case_label
from .figures import Latency, Spread, break_even, paired_ratios

Record = dict[str, Any]

CPU_NOTE = (
    "On the CPU vLLM runs an engine with LoRA eagerly and with kernels in plain torch that copy "
    "each row's weights, so LoRA's figures here say nothing about a GPU. Compare LoRA with eager "
    "base and eager PEDRO, which do without the compiler too."
)


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
    run = 0
    for record in records:
        if record["record"] == "run":
            run += 1
        if record["record"] != "measurement":
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
    workloads = list(dict.fromkeys((s.family, s.workload, s.rule) for s in series.values()))
    order = {workload: number for number, workload in enumerate(workloads)}
    return sorted(series.values(), key=lambda s: order[s.family, s.workload, s.rule])


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
        same = (other.family, other.workload, other.rule) == (like.family, like.workload, like.rule)
        if same and all(getattr(other, k) == v for k, v in wanted.items()):
            return other
    return None


# Tables ------------------------------------------------------------------------------------------


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that can be read as it is; the first ``left`` columns are text."""
    widths = [max(len(str(row[i])) for row in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = [
        "-" * width if i < left else "-" * (width - 1) + ":"
        for i, width in enumerate(max(w, 2) for w in widths)
    ]
    return "\n".join([line(headers), line(rule), *(line(row) for row in rows)])


def main_table(all_series: Sequence[Series]) -> str:
    """Everything measured, with ratios to base and to LoRA."""
    headers = (
        "workload",
        "case",
        "output tokens/s",
        "÷ base, same mode",
        "÷ LoRA",
        "÷ 1 tenant",
        "TTFT, ms",
        "TTFT ÷ base",
        "ITL, ms",
        "ITL ÷ base",
    )
    rows = []
    previous = None
    for s in all_series:
        base, lora, single = (f(s, all_series) for f in (base_of, lora_of, single_of))
        rows.append(
            (
                s.workload if s.workload != previous else "",
                s.label,
                _spread(s.spread("output_tokens_per_s"), 1),
                _spread(s.ratio(base, "output_tokens_per_s")),
                _spread(s.ratio(lora, "output_tokens_per_s")),
                _spread(s.ratio(single, "output_tokens_per_s")),
                _three(s, "ttft"),
                _spread(s.ratio(base, "ttft_mean_ms")),
                _three(s, "itl"),
                _spread(s.ratio(base, "itl_mean_ms")),
            )
        )
        previous = s.workload
    return table(headers, rows, left=2)


def summary_table(all_series: Sequence[Series]) -> str | None:
    """One line a workload: PEDRO and LoRA against base and each other, by most tenants."""
    modes = [m for m in ("compiled", "eager") if any(s.mode == m for s in all_series)]
    kinds = [k for k in ("pedro", "lora") if any(s.kind == k for s in all_series)]
    headers = ["workload"]
    for kind in kinds:
        headers += [f"{LABELS[kind]} ÷ base, {m}" for m in modes]
    headers += [f"PEDRO ÷ LoRA, {m}" for m in modes]
    headers += [f"TTFT, PEDRO ÷ base, {m}" for m in modes]
    rows = []
    for family, workload, rule in dict.fromkeys((s.family, s.workload, s.rule) for s in all_series):
        own = [s for s in all_series if (s.family, s.workload, s.rule) == (family, workload, rule)]

        def most(kind: str, mode: str, own: list[Series] = own) -> Series | None:
            found = [s for s in own if (s.kind, s.mode) == (kind, mode)]
            return max(found, key=lambda s: s.tenants) if found else None

        def over(mine: Series | None, other: Series | None, measure: str) -> str:
            return _spread(mine.ratio(other, measure)) if mine else ""

        speed, ttft = "output_tokens_per_s", "ttft_mean_ms"
        cells = [over(most(k, m), most("base", m), speed) for k in kinds for m in modes]
        cells += [over(most("pedro", m), most("lora", m), speed) for m in modes]
        cells += [over(most("pedro", m), most("base", m), ttft) for m in modes]
        if any(cells):
            rows.append([workload, *cells])
    used = [i for i in range(len(headers)) if i == 0 or any(row[i] for row in rows)]
    rows = [[row[i] for i in used] for row in rows]
    return table([headers[i] for i in used], rows) if rows else None


def short_table(all_series: Sequence[Series]) -> str:
    """The same for a terminal: throughput and its ratios."""
    headers = ("workload", "case", "tokens/s", "÷ base", "÷ LoRA", "TTFT ms", "ITL ms")
    rows = []
    previous = None
    for s in all_series:
        base, lora = base_of(s, all_series), lora_of(s, all_series)
        ttft, itl = s.spread("ttft_median_ms"), s.spread("itl_median_ms")
        rows.append(
            (
                s.workload if s.workload != previous else "",
                s.label,
                _spread(s.spread("output_tokens_per_s"), 1),
                _spread(s.ratio(base, "output_tokens_per_s")),
                _spread(s.ratio(lora, "output_tokens_per_s")),
                f"{ttft.median:.0f}" if ttft else "",
                f"{itl.median:.1f}" if itl else "",
            )
        )
        previous = s.workload
    return table(headers, rows, left=2)


def _spread(spread: Spread | None, digits: int = 2) -> str:
    return spread.format(digits) if spread else ""


def _three(series: Series, name: str) -> str:
    """mean / median / p99, each the median over the repeats."""
    found = [series.spread(f"{name}_{which}_ms") for which in ("mean", "median", "p99")]
    return " / ".join(f"{s.median:.1f}" if s else "-" for s in found) if any(found) else ""


def engine_table(records: Iterable[Record]) -> str | None:
    """Start-up and memory of each engine of each run; of one that was started often, the median
    start-up and the highest peak."""
    found: dict[tuple[int, str], list[Record]] = {}
    settings: dict[int, dict[str, Any]] = {}
    run = 0
    for record in records:
        if record["record"] == "run":
            run += 1
        elif record["record"] == "engine" and record["engine"] == "all":
            settings[run] = record["settings"]
        elif record["record"] == "engine":
            found.setdefault((run, record["engine"]), []).append(record)
    rows = []
    for (run, name), starts in found.items():
        record = starts[-1]
        lost = _blocks_lost(record, settings.get(run, {}))
        per_sequence = record.get("sequence_bytes")
        disk = record.get("adapter_bytes") or {}
        rows.append(
            (
                str(run),
                _engine_label(name),
                _number(_over(statistics.median, starts, "start_s"), 1),
                _number(_over(statistics.median, starts, "engine_s"), 1),
                _mib(_over(max, [r.get("peak_bytes", {}) for r in starts], "host"), 0),
                _mib(_over(max, [r.get("peak_bytes", {}) for r in starts], "device"), 0),
                _mib(next(iter(disk.values()), None)),
                _mib(record.get("slot_bytes")),
                "" if per_sequence is None else f"{per_sequence / 1024:.0f} KiB",
                "" if lost is None else f"{lost:.0f} of {record['kv_blocks']:,}",
            )
        )
    if not rows:
        return None
    headers = (
        "run",
        "engine",
        "start-up, s",
        "of it vLLM, s",
        "peak memory",
        "on the GPU",
        "adapter on disk",
        "on the device",
        "per sequence",
        "KV blocks its memory would hold",
    )
    if len({row[0] for row in rows}) == 1:  # nothing to tell apart
        return table(headers[1:], [row[1:] for row in rows])
    return table(headers, rows, left=2)


def _over(
    function: Callable[[list[float]], float], records: Sequence[Record], key: str
) -> float | None:
    values = [r[key] for r in records if r.get(key) is not None]
    return function(values) if values else None


def _blocks_lost(record: Record, settings: dict[str, Any]) -> float | None:
    """KV blocks that would fit where the vector store and the adapter slots are."""
    block = record.get("kv_block_bytes")
    if not block or "slot_bytes" not in record:
        return None
    slots = settings.get("adapter slots", 1)
    return float((record.get("store_bytes", 0) + slots * record["slot_bytes"]) / block)


def _engine_label(name: str) -> str:
    kind, _, mode = name.partition("-")
    return f"{LABELS.get(kind, kind)}, {mode}" if mode else name


def _mib(count: float | None, digits: int = 2) -> str:
    return "" if count is None else f"{count / 2**20:,.{digits}f} MiB"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def load_table(records: Iterable[Record]) -> str | None:
    """How long a new adapter takes to come in, over all runs."""
    times: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        if record["record"] == "load":
            firsts, seconds = times.setdefault(record["engine"], ([], []))
            firsts += record["first_ms"]
            seconds += record["second_ms"]
    rows = []
    for engine, (firsts, seconds) in times.items():
        first, second = Spread.of(firsts), Spread.of(seconds)
        rows.append(
            (
                _engine_label(engine),
                first.format(1),
                second.format(1),
                f"{first.median - second.median:.1f}",
            )
        )
    headers = ("engine", "first request, ms", "second request, ms", "loading, ms")
    return table(headers, rows) if rows else None


@dataclass(frozen=True)
class BreakEven:
    """PEDRO against LoRA at one prompt length.

    Attributes:
        prompt_tokens: Length of the prompts.
        mine, other: PEDRO and LoRA: TTFT and ITL of each repeat.
    """

    prompt_tokens: int
    modes: tuple[str, str]
    mine: tuple[Latency, ...]
    other: tuple[Latency, ...]

    @property
    def medians(self) -> tuple[Latency, Latency]:
        return _median_latency(self.mine), _median_latency(self.other)

    @property
    def tokens(self) -> int | None:
        """Output length from which PEDRO is faster; None if never."""
        return break_even(*self.medians)

    @property
    def by_repeat(self) -> list[int | None]:
        return [break_even(a, b) for a, b in zip(self.mine, self.other, strict=True)]


def _median_latency(latencies: Sequence[Latency]) -> Latency:
    return Latency(
        statistics.median(x.ttft for x in latencies), statistics.median(x.itl for x in latencies)
    )


def break_evens(all_series: Sequence[Series]) -> list[BreakEven]:
    """PEDRO against LoRA by prompt length; PEDRO in each mode that was measured."""
    result = []
    for s in all_series:
        if s.family != "break-even" or s.kind != "pedro":
            continue
        lora = lora_of(s, all_series)
        if lora is None:
            continue
        both = [i for i in s.repeats if i in lora.repeats]
        mine, other = ([_latency(x.repeats[i]) for i in both] for x in (s, lora))
        if both:
            pair = (s.mode, lora.mode)
            result.append(BreakEven(int(s.x), pair, tuple(mine), tuple(other)))
    return result


def _latency(measures: dict[str, float]) -> Latency:
    return Latency(measures["ttft_mean_ms"], measures["itl_mean_ms"])


def break_even_table(all_series: Sequence[Series]) -> str | None:
    rows = []
    for b in break_evens(all_series):
        mine, other = b.medians
        rows.append(
            (
                f"{b.prompt_tokens}",
                f"{b.modes[0]} / {b.modes[1]}",
                f"{mine.ttft:.1f} / {other.ttft:.1f}",
                f"{mine.itl:.1f} / {other.itl:.1f}",
                _tokens(b.tokens),
                ", ".join(_tokens(t) for t in b.by_repeat),
            )
        )
    headers = (
        "prompt tokens",
        "PEDRO / LoRA",
        "TTFT, ms",
        "ITL, ms",
        "PEDRO wins from output token",
        "in each repeat",
    )
    return table(headers, rows) if rows else None


def _tokens(count: int | None) -> str:
    return "never" if count is None else str(count)


def fairness_table(all_series: Sequence[Series]) -> str | None:
    rows = []
    for s in all_series:
        if not s.fairness:
            continue
        spreads = [
            _spread(Spread.of(values), 3) if values else ""
            for values in (
                [f[name] for f in s.fairness.values() if name in f]
                for name in ("jain_tokens_per_s", "worst_over_best_ttft", "worst_over_best_itl")
            )
        ]
        rows.append((s.workload, s.label, *spreads))
    headers = (
        "workload",
        "case",
        "Jain's index of tokens/s",
        "worst ÷ best TTFT",
        "worst ÷ best ITL",
    )
    return table(headers, rows, left=2) if rows else None


# The report --------------------------------------------------------------------------------------


def conditions(records: Sequence[Record]) -> list[str]:
    """What was run, on what, and how busy it was: a list in Markdown for each run."""
    lines: list[str] = []
    cores, run, runs = None, 0, sum(r["record"] == "run" for r in records)
    for record in records:
        if record["record"] == "run":
            run += 1
            host = record["machine"]
            cores = host["cores"]
            device = host.get("gpu", f"{host['cpu']}, {cores} cores")
            memory = f", {host['memory_gib']} GiB" if host.get("memory_gib") else ""
            versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
            settings = ", ".join(f"{k} {v}" for k, v in record["settings"].items())
            lines += [
                f"- {f'run {run}: ' if runs > 1 else ''}`{record['command']}`, {record['time']}",
                f"- {device}{memory}, {host['system']}; {versions}",
                f"- {settings}" if settings else "",
                f"- load average before: {_load(record)}",
            ]
        elif record["record"] == "engine" and record["engine"] == "all":
            settings = ", ".join(f"{k} {v}" for k, v in record["settings"].items())
            lines.append(f"- {record['model']}; {settings}")
        elif record["record"] == "end":
            lines.append(f"- load average after: {_load(record)}")
    loads = [r["load_average"][0] for r in records if r.get("load_average")]
    if loads and cores:
        spread = Spread.of(loads)
        lines.append(
            f"- load average during the run (last minute's, after each measurement): "
            f"{spread.format(1)} on {cores} cores. The benchmark itself accounts for about as many "
            "as it has threads; what is above that is other programs, and makes figures worse and "
            "their spread wider."
        )
    return [line for line in lines if line]


def _load(record: Record) -> str:
    values = record.get("load_average")
    return ", ".join(f"{v:.1f}" for v in values) if values else "unknown"


def runs_on_cpu(records: Iterable[Record]) -> bool:
    return any(r.get("cpu") for r in records if r["record"] == "engine")


def write_report(records: Sequence[Record], folder: Path, plots: bool = True) -> list[Path]:
    """Write ``report.md``, and PNGs beside it where there is something to plot.

    Args:
        records: From ``results.read_results``.
        folder: Where to write; it is created.
        plots: Whether to draw.

    Returns:
        The files.

    Raises:
        PedroError: There are no measurements, or matplotlib is missing.
    """
    all_series = collect(records)
    if not all_series:
        raise PedroError("the results hold no measurement")
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, Path]] = []
    if plots:
        from .plots import draw_all

        pictures = draw_all(all_series, folder)
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
    summary = summary_table(all_series)
    if summary:
        parts += ["## Ratios of output tokens/s, and of the time to the first token", summary]
    parts += ["## Everything measured", main_table(all_series), "Workloads:"]
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
