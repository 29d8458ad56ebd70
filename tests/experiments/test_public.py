"""Public data sets become the project's rows. The hub is a folder here; `datasets` is itself."""

from __future__ import annotations

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_pedro.errors import PedroError
from vllm_pedro.training.data import read_rows

FOLDER = Path(__file__).parents[2] / "benchmarks" / "experiments"
public = runpy.run_path(str(FOLDER / "public.py"))
TASKS = {t["name"]: t for t in json.loads((FOLDER / "table1.json").read_text())["tasks"]}

# Rows in the columns of the data sets on the hub, and what they have to become.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "SST-2": (
        {"idx": 0, "sentence": "a {rare} treat ", "label": 1},
        {"prompt": "Review: a {rare} treat\nSentiment:", "completion": " positive"},
    ),
    "BoolQ": (
        {"question": "is it wet", "answer": False, "passage": "Sand is dry."},
        {"prompt": "Passage: Sand is dry.\nQuestion: is it wet?\nAnswer:", "completion": " no"},
    ),
    "SQuAD": (
        {
            "id": "1",
            "title": "T",
            "context": "It is in Rome.",
            "question": "Where?",
            "answers": {"text": ["Rome", "in Rome"], "answer_start": [9, 6]},
        },
        {
            "prompt": "Context: It is in Rome.\nQuestion: Where?\nAnswer:",
            "completion": " Rome",
            "answers": ["Rome", "in Rome"],
        },
    ),
    "COPA": (
        {
            "premise": "It rained.",
            "choice1": "It got wet.",
            "choice2": "It sang.",
            "question": "effect",
            "idx": 3,
            "label": 0,
        },
        {
            "prompt": "Premise: It rained.\nWhat was the effect?\n"
            "A: It got wet.\nB: It sang.\nAnswer:",
            "completion": " A",
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows(name: str) -> None:
    columns, expected = CASES[name]
    assert public["row_of"](TASKS[name]["public"], columns) == expected


def test_unknown_columns_and_labels_are_named() -> None:
    for columns, what in (
        ({"text": "x", "label": 1}, "sentence"),
        ({"sentence": "", "label": -1}, "-1"),
    ):
        with pytest.raises(PedroError, match=f"stanfordnlp/sst2.*{what}"):
            public["row_of"](TASKS["SST-2"]["public"], columns)


def hub(folder: Path) -> dict[str, Any]:
    """A task whose data set is a folder of JSONL."""
    folder.mkdir()
    for split, count in (("train", 50), ("validation", 4)):
        lines = [json.dumps({"sentence": f"{split} {i}", "label": i % 2}) for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return TASKS["SST-2"] | {"public": TASKS["SST-2"]["public"] | {"path": str(folder)}}


def test_fetched_once_shuffled_and_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = hub(tmp_path / "hub")
    public["fetch_task"](task, tmp_path / "data")
    train = read_rows(tmp_path / "data" / task["train"])
    dev = read_rows(tmp_path / "data" / task["dev"])
    assert [row.prompt for row in dev] == [f"Review: validation {i}\nSentiment:" for i in range(4)]
    assert len({row.prompt for row in train}) == 50
    assert (
        train[0].prompt + train[1].prompt
        != "Review: train 0\nSentiment:Review: train 1\nSentiment:"
    )
    for row in train:
        number = int(str(row.prompt).split()[2])
        assert row.completion == (" positive" if number % 2 else " negative")
    with gzip.open(tmp_path / "data" / task["dev"], "wt") as file:
        file.write('{"prompt": "mine", "completion": "kept"}\n')
    public["fetch_task"](task, tmp_path / "data")
    assert read_rows(tmp_path / "data" / task["dev"])[0].prompt == "mine"


def test_dev_rows_of_another_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    task = hub(tmp_path / "hub")
    other = tmp_path / "other"
    other.mkdir()
    (other / "test.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2"}))
    task["public"]["dev"] = {
        "path": str(other),
        "split": "test",
        "prompt": "Question: {question}\nAnswer:",
        "completion": " {answer}",
    }
    public["fetch_task"](task, tmp_path / "data")
    (row,) = read_rows(tmp_path / "data" / task["dev"])
    assert (row.prompt, row.completion) == ("Question: 1 + 1?\nAnswer:", " 2")
    assert len(read_rows(tmp_path / "data" / task["train"])) == 50


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    task = hub(tmp_path / "hub")
    task["public"]["path"] = str(tmp_path / "nowhere")
    with pytest.raises(PedroError, match=r"SST-2: cannot load .*nowhere.*--data FOLDER"):
        public["fetch_task"](task, tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.gz"))
    with pytest.raises(PedroError, match="the task has no 'public' data set"):
        public["fetch_task"]({k: v for k, v in task.items() if k != "public"}, tmp_path / "data")


def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"tasks": [hub(tmp_path / "hub")]}))
    command = [sys.executable, str(FOLDER / "public.py"), str(config), "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "sst2" / "train.jsonl.gz")) == 50
