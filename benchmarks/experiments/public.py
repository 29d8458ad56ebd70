"""Public data sets by name: from the Hugging Face hub, through `datasets`, to this project's JSONL.

A task of an experiment's config may say where its data set is and how a row becomes a prompt and a
completion; `run.py` without `--data` then fetches it. By hand, all tasks of a config:

    python benchmarks/experiments/public.py benchmarks/experiments/table1.json --output DATA

A task's `public`:

    path, name, revision  as `datasets.load_dataset` takes them
    train, dev            its splits; or, of another data set, an object with a `split` and what
                          goes before the keys here
    prompt                a template; {column} is that column's text
    completion            a template, or {"column": ..., "texts": {value: text}} for labels
    answers               optional: the column with all right answers, `a.b` for a nested one
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_pedro.errors import PedroError


def row_of(public: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """One row as `vllm-pedro train` and `eval` take it.

    Raises:
        PedroError: the template names a column that is not there, or a label has no text.
    """
    texts = {k: v.strip() if isinstance(v, str) else v for k, v in columns.items()}
    row: dict[str, Any] = {}
    answers = _column(public["answers"], columns) if "answers" in public else None
    completion = public["completion"]
    try:
        row["prompt"] = public["prompt"].format(**texts)
        if isinstance(completion, str):
            row["completion"] = completion.format(
                **texts | ({"answer": answers[0]} if answers else {})
            )
        else:
            row["completion"] = completion["texts"][str(columns[completion["column"]])]
    except KeyError as error:
        raise PedroError(
            f"{public['path']}: expected a column or label {error}, found {dict(columns)}"
        ) from None
    if answers:
        row["answers"] = list(answers)
    return row


def _column(path: str, columns: Any) -> Any:
    for key in path.split("."):
        columns = columns[key]
    return columns


def fetch_task(task: Mapping[str, Any], folder: Path) -> None:
    """Write a task's train and dev files below `folder`, unless they are there.

    Rows without an answer are left out. Training rows are shuffled with seed 0, so that the first
    ones are a sample.

    Raises:
        PedroError: the task names no public data set, or it cannot be had.
    """
    missing = [kind for kind in ("train", "dev") if not (folder / task[kind]).exists()]
    if not missing:
        return
    if "public" not in task:
        raise PedroError(
            f"{task['name']}: {folder / task[missing[0]]} is not there and the task has no "
            "'public' data set; give --data FOLDER"
        )
    try:
        import datasets
    except ModuleNotFoundError:
        raise PedroError(
            "public data sets need the package 'datasets': pip install 'vllm-pedro[compare]'"
        ) from None
    for kind in missing:
        where = task["public"][kind]
        public = task["public"] | (where if isinstance(where, dict) else {"split": where})
        keywords = {k: public[k] for k in ("name", "revision", "data_files") if k in public}
        try:
            split = datasets.load_dataset(public["path"], split=public["split"], **keywords)
        except Exception as error:
            raise PedroError(
                f"{task['name']}: cannot load {public['path']} from the hub: {error}; with files "
                "of your own, give --data FOLDER"
            ) from error
        if kind == "train":
            split = split.shuffle(seed=0)
        target = folder / task[kind]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".part")
        with gzip.open(partial, "wt", encoding="utf-8") as file:
            for row in _rows(public, split):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.rename(target)


def _rows(public: Mapping[str, Any], split: Any) -> Iterator[dict[str, Any]]:
    for columns in split:
        if "answers" in public and not _column(public["answers"], columns):
            continue
        yield row_of(public, columns)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        for task in json.loads(args.config.read_text())["tasks"]:
            fetch_task(task, args.output)
            print(f"{task['name']}: {args.output / task['train']}", file=sys.stderr)
    except PedroError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
