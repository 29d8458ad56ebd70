"""The report's tables, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

from .cases import engine_label
from .figures import Spread
from .results import by_run
from .series import Record, Series, base_of, break_evens, lora_of, single_of

Cell = Callable[[Series, Sequence[Series]], str]
SPEED: Final = "output_tokens_per_s"


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


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str | None:
    """None where there is nothing in it."""
    return table(headers, rows, left) if rows else None


def median_and_range(spread: Spread | None, digits: int = 2) -> str:
    return spread.format(digits) if spread else ""


# Series ------------------------------------------------------------------------------------------


def _ratio(other: Callable[..., Series | None], measure: str = SPEED) -> Cell:
    return lambda s, every: median_and_range(s.ratio(other(s, every), measure))


def _median(measure: str, digits: int) -> Cell:
    return lambda s, _: f"{found.median:.{digits}f}" if (found := s.spread(measure)) else ""


def _three(name: str) -> Cell:
    """mean / median / p99, each the median over the repeats."""

    def cell(s: Series, _: Sequence[Series]) -> str:
        found = [s.spread(f"{name}_{which}_ms") for which in ("mean", "median", "p99")]
        return " / ".join(f"{x.median:.1f}" if x else "-" for x in found) if any(found) else ""

    return cell


MAIN: Final[dict[str, Cell]] = {
    "output tokens/s": lambda s, _: median_and_range(s.spread(SPEED), 1),
    "÷ base, same mode": _ratio(base_of),
    "÷ LoRA": _ratio(lora_of),
    "÷ 1 tenant": _ratio(single_of),
    "TTFT, ms": _three("ttft"),
    "TTFT ÷ base": _ratio(base_of, "ttft_mean_ms"),
    "ITL, ms": _three("itl"),
    "ITL ÷ base": _ratio(base_of, "itl_mean_ms"),
}
SHORT: Final[dict[str, Cell]] = {
    "tokens/s": MAIN["output tokens/s"],
    "÷ base": MAIN["÷ base, same mode"],
    "÷ LoRA": MAIN["÷ LoRA"],
    "TTFT ms": _median("ttft_median_ms", 0),
    "ITL ms": _median("itl_median_ms", 1),
}
"""The same for a terminal."""


def series_table(all_series: Sequence[Series], columns: dict[str, Cell] = MAIN) -> str:
    """Everything measured, with ratios to base and to LoRA."""
    rows = []
    previous = None
    for s in all_series:
        first = s.workload if s.workload != previous else ""
        rows.append((first, s.label, *(cell(s, all_series) for cell in columns.values())))
        previous = s.workload
    return table(("workload", "case", *columns), rows, left=2)


def summary_table(all_series: Sequence[Series]) -> str | None:
    """One line a workload: PEDRO and LoRA against base and each other, by most tenants."""
    modes = [m for m in ("compiled", "eager") if any(s.mode == m for s in all_series)]
    pairs = (
        ("pedro", "base", SPEED, "PEDRO ÷ base"),
        ("lora", "base", SPEED, "LoRA ÷ base"),
        ("pedro", "lora", SPEED, "PEDRO ÷ LoRA"),
        ("pedro", "base", "ttft_mean_ms", "TTFT, PEDRO ÷ base"),
    )
    headers = ["workload", *(f"{name}, {mode}" for *_, name in pairs for mode in modes)]
    rows = []
    for asked in dict.fromkeys(s.asked for s in all_series):
        most: dict[tuple[str, str], Series] = {}
        for s in sorted((s for s in all_series if s.asked == asked), key=lambda s: -s.tenants):
            most.setdefault((s.kind, s.mode), s)
        cells = []
        for kind, other, measure, _ in pairs:
            for mode in modes:
                mine = most.get((kind, mode))
                ratio = mine.ratio(most.get((other, mode)), measure) if mine else None
                cells.append(median_and_range(ratio))
        if any(cells):
            rows.append([asked[1], *cells])
    used = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    return _table([headers[i] for i in used], [[row[i] for i in used] for row in rows])


def break_even_table(all_series: Sequence[Series]) -> str | None:
    def tokens(count: int | None) -> str:
        return "never" if count is None else str(count)

    rows = []
    for b in break_evens(all_series):
        mine, other = b.medians
        rows.append(
            (
                f"{b.prompt_tokens}",
                f"{b.modes[0]} / {b.modes[1]}",
                f"{mine.ttft:.1f} / {other.ttft:.1f}",
                f"{mine.itl:.1f} / {other.itl:.1f}",
                tokens(b.tokens),
                ", ".join(map(tokens, b.by_repeat)),
            )
        )
    headers = ["prompt tokens", "PEDRO / LoRA", "TTFT, ms", "ITL, ms"]
    return _table([*headers, "PEDRO wins from output token", "in each repeat"], rows)


def fairness_table(all_series: Sequence[Series]) -> str | None:
    columns = {
        "jain_tokens_per_s": "Jain's index of tokens/s",
        "worst_over_best_ttft": "worst ÷ best TTFT",
        "worst_over_best_itl": "worst ÷ best ITL",
    }
    rows = []
    for s in all_series:
        found = [[f[name] for f in s.fairness.values() if name in f] for name in columns]
        if s.fairness:
            cells = (median_and_range(Spread.of(v), 3) if v else "" for v in found)
            rows.append((s.workload, s.label, *cells))
    return _table(("workload", "case", *columns.values()), rows, left=2)


# Engines -----------------------------------------------------------------------------------------


def _over(function: Callable[[list[float]], float], starts: list[Record], *keys: str) -> Any:
    """A function of what a key, or a key within a key, says in each start; None if nowhere."""
    values: list[Any] = starts
    for key in keys:
        values = [v[key] for v in values if v.get(key) is not None]
    return function(values) if values else None


_median_of = partial(_over, statistics.median)
_most = partial(_over, max)


def _mib(count: float | None, digits: int = 2) -> str:
    return "" if count is None else f"{count / 2**20:,.{digits}f} MiB"


def _blocks(record: Record, settings: Record) -> str:
    """KV blocks that would fit where the vector store and the adapter slots are."""
    block = record.get("kv_block_bytes")
    if not block or "slot_bytes" not in record:
        return ""
    lost = record.get("store_bytes", 0) + settings.get("adapter slots", 1) * record["slot_bytes"]
    return f"{lost / block:.0f} of {record['kv_blocks']:,}"


def engine_table(records: Iterable[Record]) -> str | None:
    """Start-up and memory of each engine of each run; of one that was started often, the median
    start-up and the highest peak."""
    found: dict[tuple[int, str], list[Record]] = {}
    settings: dict[int, Record] = {}
    for run, what, record in by_run(records):
        if what == "settings":
            settings[run] = record["settings"]
        elif what == "engine":
            found.setdefault((run, record["engine"]), []).append(record)
    rows = []
    for (run, name), starts in found.items():
        last = starts[-1]
        seconds = (_median_of(starts, key) for key in ("start_s", "engine_s"))
        vectors = last.get("sequence_bytes")
        disk = last.get("adapter_bytes") or {}
        rows.append(
            (
                str(run),
                engine_label(name),
                *("" if s is None else f"{s:.1f}" for s in seconds),
                _mib(_most(starts, "peak_bytes", "host"), 0),
                _mib(_most(starts, "peak_bytes", "device"), 0),
                _mib(next(iter(disk.values()), None)),
                _mib(last.get("slot_bytes")),
                "" if vectors is None else f"{vectors / 1024:.0f} KiB",
                _blocks(last, settings.get(run, {})),
            )
        )
    headers = ["run", "engine", "start-up, s", "of it vLLM, s", "peak memory", "on the GPU"]
    headers += ["adapter on disk", "on the device", "per sequence"]
    headers += ["KV blocks its memory would hold"]
    if len({row[0] for row in rows}) == 1:  # nothing to tell apart
        return table(headers[1:], [row[1:] for row in rows])
    return _table(headers, rows, left=2)


def load_table(records: Iterable[Record]) -> str | None:
    """How long a new adapter takes to come in, over all runs."""
    times: dict[str, list[Record]] = {}
    for record in records:
        if record["record"] == "load":
            times.setdefault(record["engine"], []).append(record)
    rows = []
    for engine, loads in times.items():
        first, second = (
            Spread.of(t for load in loads for t in load[key]) for key in ("first_ms", "second_ms")
        )
        longer = f"{first.median - second.median:.1f}"
        rows.append((engine_label(engine), first.format(1), second.format(1), longer))
    return _table(("engine", "first request, ms", "second request, ms", "loading, ms"), rows)
