"""Measurements of a case, what they are compared with, and the report's tables, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import PedroError
from .cases import case_label, engine_label
from .figures import Spread, break_even, paired_ratios
from .results import by_run

SPEED: Final = "output_tokens_per_s"
TTFT: Final = "ttft_mean_ms"
ITL: Final = "itl_mean_ms"

Record = dict[str, Any]


@dataclass
class Series:
    """One case of one workload: all its repeats.

    Attributes:
        repeats: Repeat -> measures, with those of fairness where several tenants asked.
    """

    family: str
    x: float
    workload: str
    rule: str
    kind: str
    mode: str
    tenants: int
    repeats: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return case_label(self.kind, self.mode, self.tenants)

    @property
    def asked(self) -> tuple[str, str, str]:
        """What it shares with those that it is compared with."""
        return self.family, self.workload, self.rule

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
    for run, what, record in by_run(records):
        if what != "measurement":
            continue
        keys = ("family", "x", "workload", "rule", "kind", "mode", "tenants")
        try:
            identity = tuple(record[k] for k in keys)
            repeat, measures = int(record["repeat"]), dict(record["measures"])
        except (KeyError, TypeError, ValueError) as error:
            raise PedroError(f"a measurement lacks or garbles {error}") from None
        found = series.setdefault(identity, Series(*identity))
        found.repeats[run * 1_000_000 + repeat] = measures | record.get("fairness", {})
    order = list(dict.fromkeys(s.asked for s in series.values()))
    return sorted(series.values(), key=lambda s: order.index(s.asked))


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
        if other.asked == like.asked and all(getattr(other, k) == v for k, v in wanted.items()):
            return other
    return None


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that can be read as it is; the first `left` columns are text. Empty where
    there are no rows."""
    if not rows:
        return ""
    widths = [max(2, *(len(row[i]) for row in (headers, *rows))) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(map(line, (headers, rule, *rows)))


# Of series ---------------------------------------------------------------------------------------

Cell = Callable[[Series, Sequence[Series]], str]


def shown(spread: Spread | None, digits: int = 2) -> str:
    return spread.format(digits) if spread else ""


def _ratio(other: Callable[..., Series | None], measure: str = SPEED) -> Cell:
    return lambda s, every: shown(s.ratio(other(s, every), measure))


def _medians(digits: int, *measures: str) -> Cell:
    """Medians over the repeats."""

    def cell(s: Series, _: Sequence[Series]) -> str:
        found = [s.spread(measure) for measure in measures]
        texts = (f"{x.median:.{digits}f}" if x else "-" for x in found)
        return " / ".join(texts) if any(found) else ""

    return cell


MAIN: Final[dict[str, Cell]] = {
    "output tokens/s": lambda s, _: shown(s.spread(SPEED), 1),
    "÷ base, same mode": _ratio(base_of),
    "÷ LoRA": _ratio(lora_of),
    "÷ 1 tenant": _ratio(single_of),
    "TTFT, ms": _medians(1, TTFT, "ttft_median_ms", "ttft_p99_ms"),
    "TTFT ÷ base": _ratio(base_of, TTFT),
    "ITL, ms": _medians(1, ITL, "itl_median_ms", "itl_p99_ms"),
    "ITL ÷ base": _ratio(base_of, ITL),
}
SHORT: Final[dict[str, Cell]] = {
    "tokens/s": MAIN["output tokens/s"],
    "÷ base": MAIN["÷ base, same mode"],
    "÷ LoRA": MAIN["÷ LoRA"],
    "TTFT ms": _medians(0, "ttft_median_ms"),
    "ITL ms": _medians(1, "itl_median_ms"),
}
"""The same for a terminal."""


def series_table(all_series: Sequence[Series], columns: Mapping[str, Cell] = MAIN) -> str:
    """Everything measured, with ratios to base and to LoRA."""
    rows = []
    previous = ""
    for s in all_series:
        first = s.workload if s.workload != previous else ""
        rows.append((first, s.label, *(cell(s, all_series) for cell in columns.values())))
        previous = s.workload
    return table(("workload", "case", *columns), rows, left=2)


def summary_table(all_series: Sequence[Series]) -> str:
    """One line a workload: PEDRO and LoRA against base and each other, by most tenants."""
    modes = [m for m in ("compiled", "eager") if any(s.mode == m for s in all_series)]
    pairs = (
        ("pedro", "base", SPEED, "PEDRO ÷ base"),
        ("lora", "base", SPEED, "LoRA ÷ base"),
        ("pedro", "lora", SPEED, "PEDRO ÷ LoRA"),
        ("pedro", "base", TTFT, "TTFT, PEDRO ÷ base"),
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
                cells.append(shown(mine.ratio(most.get((other, mode)), measure) if mine else None))
        if any(cells):
            rows.append([asked[1], *cells])
    used = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    return table([headers[i] for i in used], [[row[i] for i in used] for row in rows])


def break_even_table(all_series: Sequence[Series]) -> str:
    """The output length from which PEDRO is faster than LoRA, by prompt length."""

    def faster_from(*latencies: tuple[float, float]) -> str:
        return str(break_even(*latencies) or "never")

    rows = []
    for s in all_series:
        lora = lora_of(s, all_series)
        if s.family != "break-even" or s.kind != "pedro" or lora is None:
            continue
        both = [
            ((mine[TTFT], mine[ITL]), (other[TTFT], other[ITL]))
            for i, mine in s.repeats.items()
            if (other := lora.repeats.get(i))
        ]
        ttfts, itls = (
            [statistics.median(pair[which][part] for pair in both) for which in (0, 1)]
            for part in (0, 1)
        )
        rows.append(
            (
                f"{s.x:.0f}",
                f"{s.mode} / {lora.mode}",
                " / ".join(f"{ttft:.1f}" for ttft in ttfts),
                " / ".join(f"{itl:.1f}" for itl in itls),
                faster_from(*zip(ttfts, itls, strict=True)),
                ", ".join(faster_from(*pair) for pair in both),
            )
        )
    headers = ("prompt tokens", "PEDRO / LoRA", "TTFT, ms", "ITL, ms")
    return table((*headers, "PEDRO wins from output token", "in each repeat"), rows)


def fairness_table(all_series: Sequence[Series]) -> str:
    columns = {
        "jain_tokens_per_s": "Jain's index of tokens/s",
        "worst_over_best_ttft": "worst ÷ best TTFT",
        "worst_over_best_itl": "worst ÷ best ITL",
    }
    rows = [
        (s.workload, s.label, *(shown(s.spread(name), 3) for name in columns))
        for s in all_series
        if s.spread("jain_tokens_per_s")
    ]
    return table(("workload", "case", *columns.values()), rows, left=2)


# Of engines --------------------------------------------------------------------------------------


def _mib(count: float | None, digits: int = 2) -> str:
    return "" if count is None else f"{count / 2**20:,.{digits}f} MiB"


def _blocks(record: Record, settings: Record) -> str:
    """KV blocks that would fit where the vector store and the adapter slots are."""
    block = record.get("kv_block_bytes")
    if not block or "slot_bytes" not in record:
        return ""
    lost = record.get("store_bytes", 0) + settings.get("adapter slots", 1) * record["slot_bytes"]
    return f"{lost / block:.0f} of {record['kv_blocks']:,}"


def engine_table(records: Iterable[Record]) -> str:
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
        seconds = (
            [start[key] for start in starts if key in start] for key in ("start_s", "engine_s")
        )
        peaks = (
            max((s["peak_bytes"][where] for s in starts if where in s["peak_bytes"]), default=None)
            for where in ("host", "device")
        )
        vectors = last.get("sequence_bytes")
        rows.append(
            (
                str(run),
                engine_label(name),
                *(f"{statistics.median(values):.1f}" if values else "" for values in seconds),
                *(_mib(peak, 0) for peak in peaks),
                _mib(next(iter((last.get("adapter_bytes") or {}).values()), None)),
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
    return table(headers, rows, left=2)


def load_table(records: Iterable[Record]) -> str:
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
    return table(("engine", "first request, ms", "second request, ms", "loading, ms"), rows)
