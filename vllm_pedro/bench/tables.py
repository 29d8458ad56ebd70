"""The report's tables, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .cases import LABELS, EngineName
from .figures import Spread
from .results import by_run, is_settings
from .series import Record, Series, base_of, break_evens, lora_of, single_of


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that can be read as it is; the first `left` columns are text."""
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
                median_and_range(s.spread("output_tokens_per_s"), 1),
                median_and_range(s.ratio(base, "output_tokens_per_s")),
                median_and_range(s.ratio(lora, "output_tokens_per_s")),
                median_and_range(s.ratio(single, "output_tokens_per_s")),
                _three(s, "ttft"),
                median_and_range(s.ratio(base, "ttft_mean_ms")),
                _three(s, "itl"),
                median_and_range(s.ratio(base, "itl_mean_ms")),
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
            return median_and_range(mine.ratio(other, measure)) if mine else ""

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
                median_and_range(s.spread("output_tokens_per_s"), 1),
                median_and_range(s.ratio(base, "output_tokens_per_s")),
                median_and_range(s.ratio(lora, "output_tokens_per_s")),
                f"{ttft.median:.0f}" if ttft else "",
                f"{itl.median:.1f}" if itl else "",
            )
        )
        previous = s.workload
    return table(headers, rows, left=2)


def median_and_range(spread: Spread | None, digits: int = 2) -> str:
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
    for run, record in by_run(records):
        if is_settings(record):
            settings[run] = record["settings"]
        elif record["record"] == "engine":
            found.setdefault((run, record["engine"]), []).append(record)
    rows = []
    for (number, name), starts in found.items():
        record = starts[-1]
        lost = _blocks_lost(record, settings.get(number, {}))
        per_sequence = record.get("sequence_bytes")
        disk = record.get("adapter_bytes") or {}
        rows.append(
            (
                str(number),
                EngineName(name).label,
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
                EngineName(engine).label,
                first.format(1),
                second.format(1),
                f"{first.median - second.median:.1f}",
            )
        )
    headers = ("engine", "first request, ms", "second request, ms", "loading, ms")
    return table(headers, rows) if rows else None


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
            median_and_range(Spread.of(values), 3) if values else ""
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
