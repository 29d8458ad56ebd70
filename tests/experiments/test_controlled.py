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


def test_two_tasks(tmp_path: Path) -> None:
    seen = set()
    for row in rows_of("two-tasks", tmp_path / "rows.jsonl"):
        words = row["prompt"].split("\n")[0].removeprefix("Words: ").split()
        are_animals = set(words) <= set(controlled["ANIMALS"])
        assert are_animals or set(words) <= set(controlled["FRUITS"])
        assert row["completion"] == f" {words[0 if are_animals else -1]}"
        seen.add(are_animals)
    assert len(seen) == 2
    assert not set(controlled["ANIMALS"]) & set(controlled["FRUITS"])


def test_flip(tmp_path: Path) -> None:
    seen = set()
    for row in rows_of("flip", tmp_path / "rows.jsonl"):
        is_good = any(f" was {word}." in row["prompt"] for word in controlled["GOOD"])
        is_opposite = "the opposite" in row["prompt"]
        assert row["completion"] == (" positive" if is_good != is_opposite else " negative")
        seen.add((is_good, is_opposite))
    assert len(seen) == 4


@pytest.mark.parametrize("name", list(controlled["TASKS"]))
def test_prompts_end_alike_and_seeds_decide(name: str, tmp_path: Path) -> None:
    rows = rows_of(name, tmp_path / "a.jsonl")
    assert {row["prompt"][-1] for row in rows} == {":"}
    assert rows == rows_of(name, tmp_path / "b.jsonl")
    assert rows != rows_of(name, tmp_path / "c.jsonl", seed=2)
    assert rows[:50] == rows_of(name, tmp_path / "d.jsonl", rows=50)
