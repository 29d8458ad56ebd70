"""Tasks that need the prompt: what they ask for, and that the same seed makes the same rows."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "experiments"
controlled = runpy.run_path(str(FOLDER / "controlled.py"))
write_task = controlled["write_task"]


def rows_of(name: str, path: Path, seed: int = 1, rows: int = 200) -> list[dict[str, str]]:
    write_task(name, path, seed, rows)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_keyed(tmp_path: Path) -> None:
    for row in rows_of("keyed", tmp_path / "rows.jsonl"):
        first, second = row["prompt"].split("\n")
        words = first.removeprefix("Words: ").split()
        place = ["blue", "green", "red", "yellow"].index(second.split()[1].rstrip(":"))
        assert row["completion"] == f" {words[place]}"
        assert len(set(words)) == 4


def test_kinds(tmp_path: Path) -> None:
    seen = set()
    for row in rows_of("kinds", tmp_path / "rows.jsonl"):
        words = row["prompt"].split("\n")[0].removeprefix("Words: ").split()
        places = [place for kind, place in controlled["KINDS"] if set(words) <= set(kind)]
        assert len(places) == 1  # no word is of two kinds
        assert row["completion"] == f" {words[places[0]]}"
        seen.add(places[0])
    assert seen == {0, 1, 2, 3}


def test_rules(tmp_path: Path) -> None:
    wanted = {
        "moss": lambda d: d[0],
        "fern": lambda d: d[4],
        "clay": lambda d: sorted(d)[4],
        "dune": lambda d: sorted(d)[0],
        "reed": lambda d: d[1],
        "slate": lambda d: d[3],
    }
    seen = set()
    for row in rows_of("rules", tmp_path / "rows.jsonl"):
        first, second, _ = row["prompt"].split("\n")
        rule = first.removeprefix("Rule ").rstrip(".")
        digits = [int(digit) for digit in second.removeprefix("Digits: ").split()]
        assert len(set(digits)) == 5
        assert row["completion"] == f" {wanted[rule](digits)}"
        seen.add(rule)
    assert seen == set(wanted)


@pytest.mark.parametrize("name", list(controlled["TASKS"]))
def test_prompts_end_alike_and_seeds_decide(name: str, tmp_path: Path) -> None:
    rows = rows_of(name, tmp_path / "a.jsonl")
    assert {row["prompt"][-1] for row in rows} == {":"}
    assert rows == rows_of(name, tmp_path / "b.jsonl")
    assert rows != rows_of(name, tmp_path / "c.jsonl", seed=2)
    assert rows[:50] == rows_of(name, tmp_path / "d.jsonl", rows=50)
