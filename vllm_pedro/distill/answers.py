"""A teacher's answers on disk: one line of JSON a prompt, appended as they come.

The first line says what was asked of whom; whoever goes on with the file asks the same. A chunk of
prompts is asked together and appended together, and of a chunk that was cut short nothing is kept:
what a teacher samples may depend on what else is in its batch, and an interrupted run is to end
with the same answers as an undisturbed one.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import PedroError
from ..files import replace_file

ANSWERS_NAME: Final = "answers.jsonl"
LEAST: Final = -100.0
"""Log probability of what has none, such as the rest where a sum of 16-bit values exceeds one."""


@dataclass(frozen=True)
class Answer:
    """What a teacher answered, T tokens, and what else it might have.

    Attributes:
        tokens: with the one that ends it, unless it was cut off.
        ids: `[T, k]` int32, the likeliest tokens of each place, the likeliest first.
        bins: `[T, k + 1]` float32, their log probabilities and that of all others together.
    """

    tokens: list[int]
    ids: NDArray[np.int32]
    bins: NDArray[np.float32]


def bytes_per_token(top_k: int) -> int:
    """What a token of an answer takes on disk, roughly."""
    return (8 * top_k + 4) * 4 // 3 + 6


class AnswerFile:
    """The answers to a list of prompts, in their order, as far as they have come.

    Args:
        path: the file.
        header: what was asked of whom: values of JSON.
        number: how many prompts there are.
        chunk: how many are asked together.

    Raises:
        PedroError: the file has answers to other questions, or cannot be read.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], number: int, chunk: int) -> None:
        self._path = path
        self._number, self._chunk = number, chunk
        self.answers: list[list[Answer]] = []
        try:
            if path.exists():
                self._read(header)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, _line(header))
        except OSError as error:
            raise PedroError(f"{path}: {error.strerror}") from error

    @property
    def is_whole(self) -> bool:
        """Whether every prompt is answered."""
        return len(self.answers) == self._number

    @property
    def next_chunk(self) -> range:
        """The prompts to ask next."""
        begin = len(self.answers)
        return range(begin, min(begin + self._chunk, self._number))

    def append(self, answers: Sequence[Sequence[Answer]]) -> None:
        """Add the answers to the prompts of `next_chunk`.

        Raises:
            PedroError: the disk is full, or the file is gone.
        """
        assert len(answers) == len(self.next_chunk)
        data = b"".join(_line({"answers": [_write(a) for a in row]}) for row in answers)
        try:
            with open(self._path, "r+b") as file:
                file.seek(0, os.SEEK_END)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PedroError(f"{self._path}: {error.strerror}") from error
        self.answers += [list(row) for row in answers]

    def _read(self, header: Mapping[str, Any]) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        try:
            found = json.loads(lines[0])
        except (IndexError, ValueError):
            raise PedroError(f"{self._path}: expected a teacher's answers; remove it") from None
        wanted = json.loads(json.dumps(header))
        if found != wanted:
            other = [key for key in wanted if found.get(key) != wanted[key]]
            raise PedroError(
                f"{self._path} holds answers to other questions ({', '.join(other)} differ); "
                "--force replaces them"
            )
        rows = []
        for line in lines[1 : 1 + self._number]:
            try:
                if not line.endswith(b"\n"):
                    break
                rows.append([_parse(values) for values in json.loads(line)["answers"]])
            except (ValueError, KeyError, TypeError):
                break  # cut short
        if len(rows) < self._number:
            rows = rows[: len(rows) - len(rows) % self._chunk]
        self.answers = rows
        os.truncate(self._path, sum(map(len, lines[: 1 + len(rows)])))


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def _write(answer: Answer) -> dict[str, Any]:
    ids, bins = (
        base64.b64encode(array.astype(kind).tobytes()).decode()
        for array, kind in ((answer.ids, "<i4"), (answer.bins, "<f4"))
    )
    return {"tokens": answer.tokens, "ids": ids, "bins": bins}


def _parse(values: Mapping[str, Any]) -> Answer:
    tokens = [int(token) for token in values["tokens"]]
    ids = np.frombuffer(base64.b64decode(values["ids"]), "<i4").reshape(len(tokens), -1).copy()
    bins = np.frombuffer(base64.b64decode(values["bins"]), "<f4").reshape(len(tokens), -1).copy()
    return Answer(tokens, ids, bins)
