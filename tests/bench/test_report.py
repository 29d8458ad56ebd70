"""Reports: known measurements in, known ratios, tables, texts and plots out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_pedro.bench.plots import draw_all, draw_bars, draw_lines
from vllm_pedro.bench.report import CPU_NOTE, markdown, write_report
from vllm_pedro.bench.results import Recorder, read_results
from vllm_pedro.bench.tables import (
    ITL,
    SPEED,
    break_even_table,
    collect,
    engine_table,
    series_table,
    single_of,
    summary_table,
)
from vllm_pedro.errors import PedroError

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "benchmarks"

RUN = {
    "record": "run",
    "time": "2026-01-01T00:00:00+00:00",
    "command": "vllm-pedro bench --quick",
    "machine": {"cpu": "A CPU", "cores": 2, "memory_gib": 8.0, "system": "Linux x86_64"},
    "versions": {"vllm-pedro": "0.1.0"},
    "load_average": [1.0, 1.0, 1.0],
    "settings": {"repeats": 2},
}
ALL = {
    "record": "engine",
    "engine": "all",
    "settings": {"adapter slots": 4},
    "model": "M",
    "cpu": True,
}


def measurement(
    kind: str,
    mode: str,
    repeat: int,
    speed: float,
    *,
    tenants: int = 0,
    family: str = "decode",
    workload: str = "decode-heavy",
    x: float = 0.0,
    ttft: float = 100.0,
    itl: float = 10.0,
    **fields: Any,
) -> dict[str, Any]:
    measures = {"output_tokens_per_s": speed}
    for name, value in (("ttft", ttft), ("itl", itl)):
        measures |= {f"{name}_{which}_ms": value for which in ("mean", "median", "p99")}
    return {
        "record": "measurement",
        "family": family,
        "x": x,
        "workload": workload,
        "rule": f"rule of {workload}",
        "kind": kind,
        "mode": mode,
        "tenants": tenants,
        "repeat": repeat,
        "measures": measures,
        "load_average": [2.0, 1.0, 1.0],
        **fields,
    }


@pytest.fixture
def records() -> list[dict[str, Any]]:
    """PEDRO is 0.9 of base and 3 times eager LoRA, while the machine slows down by half."""
    found: list[dict[str, Any]] = [RUN, ALL]
    for repeat, pace in enumerate((1.0, 0.5)):
        found += [
            measurement("base", "compiled", repeat, 100 * pace),
            measurement("pedro", "compiled", repeat, 90 * pace, tenants=8, ttft=105 / pace),
            measurement("pedro", "compiled", repeat, 92 * pace, tenants=1),
            measurement("base", "eager", repeat, 60 * pace),
            measurement(
                "lora",
                "eager",
                repeat,
                30 * pace,
                tenants=8,
                fairness={"jain_tokens_per_s": 0.9, "worst_over_best_ttft": 2.0},
            ),
        ]
    found.append({"record": "end", "time": "later", "load_average": [3.0, 2.0, 1.0]})
    return found


def cells(text: str) -> dict[str, list[str]]:
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {row[1]: row for row in rows}


def test_ratios_in_the_table(records: list[dict[str, Any]]) -> None:
    rows = cells(series_table(collect(records)))
    pedro = rows["PEDRO, compiled, 8 tenants"]
    assert pedro[2] == "67.5 (45.0-90.0)"
    assert pedro[3] == "0.90 (0.90-0.90)"  # to compiled base
    assert pedro[4] == "3.00 (3.00-3.00)"  # to LoRA with as many tenants
    assert pedro[5] == "0.98 (0.98-0.98)"  # to one tenant
    assert pedro[7] == "1.58 (1.05-2.10)"
    lora = rows["LoRA, eager, 8 tenants"]
    assert lora[3] == "0.50 (0.50-0.50)"  # to eager base, not to compiled
    assert lora[4] == ""
    assert rows["base, compiled"][3:6] == ["", "", ""]
    assert rows["PEDRO, compiled, 1 tenant"][4] == ""  # no LoRA with one tenant was measured


def test_the_summary_has_a_line_a_workload(records: list[dict[str, Any]]) -> None:
    text = summary_table(collect(records))
    header, _, *lines = [[c.strip() for c in t.strip("|").split("|")] for t in text.splitlines()]
    (line,) = lines
    assert dict(zip(header, line, strict=True)) == {
        "workload": "decode-heavy",
        "PEDRO ÷ base, compiled": "0.90 (0.90-0.90)",  # with 8 tenants, not with one
        "LoRA ÷ base, eager": "0.50 (0.50-0.50)",
        "TTFT, PEDRO ÷ base, compiled": "1.58 (1.05-2.10)",
    }
    records += [measurement("pedro", "eager", r, 54 * p, tenants=8) for r, p in ((0, 1), (1, 0.5))]
    text = summary_table(collect(records))
    assert "PEDRO ÷ LoRA, eager" in text
    assert "1.80 (1.80-1.80)" in text
    assert "PEDRO ÷ LoRA, compiled" not in text
    assert summary_table(collect([measurement("base", "eager", 0, 1)])) == ""


def test_lora_of_the_same_mode_is_taken_where_there_is_one(records: list[dict[str, Any]]) -> None:
    records += [
        measurement("lora", "compiled", r, 75 * p, tenants=8) for r, p in ((0, 1), (1, 0.5))
    ]
    row = cells(series_table(collect(records)))["PEDRO, compiled, 8 tenants"]
    assert row[4] == "1.20 (1.20-1.20)"


def test_ratios_never_cross_runs() -> None:
    """Two runs in one report: repeat 0 of each is another repeat."""
    first = [RUN, measurement("base", "eager", 0, 100), measurement("pedro", "eager", 0, 90)]
    second = [RUN, measurement("base", "eager", 0, 10), measurement("pedro", "eager", 0, 9)]
    row = cells(series_table(collect([*first, *second])))["PEDRO, eager, unused"]
    assert row[3] == "0.90 (0.90-0.90)"


def test_series_of_a_workload_stand_together() -> None:
    mixed = [
        measurement(kind, "eager", 0, 1, workload=w)
        for kind in ("base", "lora")
        for w in ("a", "b")
    ]
    assert [s.workload for s in collect(mixed)] == ["a", "a", "b", "b"]


def break_even_records(pedro: list[tuple[float, float]]) -> list[dict[str, Any]]:
    found = []
    for repeat, (ttft, itl) in enumerate(pedro):
        shared = {"family": "break-even", "workload": "prompt of 32", "x": 32.0, "tenants": 1}
        found += [
            measurement("pedro", "eager", repeat, 1, ttft=ttft, itl=itl, **shared),
            measurement("lora", "eager", repeat, 1, ttft=100, itl=20, **shared),
        ]
    return found


def test_break_even_from_known_latencies() -> None:
    text = break_even_table(collect(break_even_records([(150, 10), (150, 10), (90, 30)])))
    row = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert row == ["32", "eager / eager", "150.0 / 100.0", "10.0 / 20.0", "7", "7, 7, never"]


def test_memory_lost_to_the_store() -> None:
    engine = {
        "record": "engine",
        "engine": "pedro-compiled",
        "start_s": 20.0,
        "engine_s": 10.0,
        "peak_bytes": {"host": 2**30},
        "adapter_bytes": {"pedro": 3 << 20},
        "kv_blocks": 100,
        "kv_block_bytes": 1000,
        "slot_bytes": 500,
        "store_bytes": 3000,
        "sequence_bytes": 2048,
    }
    text = engine_table([ALL, engine])
    row = [c.strip() for c in text.splitlines()[2].strip("|").split("|")]
    assert row[0] == "PEDRO, compiled"
    assert row[1:4] == ["20.0", "10.0", "1,024 MiB"]
    assert row[5] == "3.00 MiB"
    assert row[7] == "2 KiB"
    assert row[8] == "5 of 100"  # (3,000 + 4 slots x 500) / 1,000
    assert engine_table([ALL]) == ""


def test_the_report_says_what_it_was_measured_on(records: list[dict[str, Any]]) -> None:
    text = markdown(records, collect(records))
    assert "`vllm-pedro bench --quick`" in text
    assert "A CPU, 2 cores, 8.0 GiB" in text
    assert "load average before: 1.0" in text
    assert "load average after: 3.0" in text
    assert "2.0 (1.0-3.0) on 2 cores" in text
    assert CPU_NOTE in text
    assert "rule of decode-heavy" in text
    assert "0.900 (0.900-0.900)" in text  # fairness
    gpu = [r for r in records if r.get("engine") != "all"]
    assert CPU_NOTE not in markdown(gpu, collect(gpu))


def test_results_go_to_a_file_and_back(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    recorder = Recorder(tmp_path / "sub" / "results.jsonl")
    recorder.begin(["--quick", "--model", "/some/where/model"], repeats=2)
    for record in records[1:-1]:
        recorder.add(**record)
    recorder.end()
    found = read_results([tmp_path / "sub" / "results.jsonl"])
    assert found == recorder.records
    assert found[0]["command"] == "vllm-pedro bench --quick --model model"
    assert "/some/where" not in (tmp_path / "sub" / "results.jsonl").read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"record": "other"}', "{}"])
def test_files_that_are_no_results(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(PedroError, match=r"line 1: expected|are empty"):
        read_results([path])


def test_results_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PedroError, match="cannot read"):
        read_results([tmp_path / "none"])
    with pytest.raises(PedroError, match="no measurement"):
        write_report([RUN], tmp_path)
    with pytest.raises(PedroError, match="'x'"):
        collect([{"record": "measurement", "family": "decode"}])


# Plots


@pytest.fixture
def everything(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for x, lengths in ((1, "32 + 16"), (8, "32 + 16"), (1000, "16 + 8")):
        for kind in ("base", "pedro"):
            for tenants in {1, x} if kind == "pedro" else {0}:
                records += [
                    measurement(
                        kind,
                        "compiled",
                        repeat,
                        100 + 5 * repeat - (tenants == x),
                        tenants=tenants,
                        family="tenants",
                        workload=f"{x} tenants, {lengths}",
                        x=float(x),
                    )
                    | {"rule": f"{4 * x} requests of {lengths} tokens; closed loop of 4"}
                    for repeat in (0, 1)
                ]
    for x in (1, 16):
        records += [
            measurement(k, "eager", r, 1, family="concurrency", workload=f"c {x}", x=x, itl=x + r)
            for k in ("base", "lora")
            for r in (0, 1)
        ]
    return records + break_even_records([(150, 10), (160, 10)])


def test_plots_begin_at_zero_and_show_the_spread(everything: list[dict[str, Any]]) -> None:
    all_series = collect(everything)
    of = {s.family: [t for t in all_series if t.family == s.family] for s in all_series}
    bars = draw_bars(all_series).axes[0]
    assert bars.get_xlim()[0] == 0
    assert bars.containers  # with error bars
    tenants = draw_lines(
        of["tenants"], lambda s: s.ratio(single_of(s, all_series), SPEED), "", joined=False
    ).axes[0]
    ticks = ["1 tenants\n32 + 16", "8 tenants\n32 + 16", "1000 tenants\n16 + 8"]
    assert [t.get_text() for t in tenants.get_xticklabels()] == ticks
    (points,) = (container.lines[0] for container in tenants.containers)
    assert list(points.get_xdata()) == [1, 2]
    assert list(points.get_ydata()) == pytest.approx([(99 / 100 + 104 / 105) / 2] * 2)
    latencies = draw_lines(of["concurrency"], lambda s: s.spread(ITL), "ms").axes[0]
    assert latencies.get_ylim()[0] == tenants.get_ylim()[0] == 0
    base, lora = (container.lines[0] for container in latencies.containers)
    # Told apart without colour.
    assert base.get_marker() != lora.get_marker()
    assert base.get_linestyle() != lora.get_linestyle()
    assert float(lora.get_color()) >= 0  # a shade of grey


def test_nothing_to_plot(tmp_path: Path) -> None:
    assert draw_all([], tmp_path) == []


def test_a_report_with_pictures(tmp_path: Path, everything: list[dict[str, Any]]) -> None:
    paths = write_report(everything, tmp_path / "out")
    names = [p.name for p in paths]
    assert names == [
        "report.md",
        "throughput.png",
        "tenants.png",
        "concurrency.png",
    ]
    text = paths[0].read_text()
    for path in paths[1:]:
        assert f"({path.name})" in text
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", sorted(DOCS.glob("*/results.jsonl")), ids=lambda p: p.parent.name)
def test_the_reports_in_docs_are_those_of_their_results(path: Path, tmp_path: Path) -> None:
    paths = write_report(read_results([path]), tmp_path)
    assert paths[0].read_text() == (path.parent / "report.md").read_text()
    for picture in paths[1:]:
        assert (path.parent / picture.name).is_file()


def test_no_plots_on_request(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    assert [p.name for p in write_report(records, tmp_path, plots=False)] == ["report.md"]
