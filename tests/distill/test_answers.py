"""A teacher's answers on disk: whole chunks, in order, of the questions that were asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_pedro.distill.answers import Answer, AnswerFile, bytes_per_token
from vllm_pedro.errors import PedroError

HEADER = {"teacher": "abc", "top_k": 2}


def make(seed: int, tokens: int = 3) -> Answer:
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 99, (tokens, 2)).astype(np.int32)
    return Answer(ids[:, 0].tolist(), ids, draw.normal(size=(tokens, 3)).astype(np.float32))


def same(one: AnswerFile, other: AnswerFile) -> bool:
    return [[(a.tokens, a.ids.tolist(), a.bins.tolist()) for a in row] for row in one.answers] == [
        [(a.tokens, a.ids.tolist(), a.bins.tolist()) for a in row] for row in other.answers
    ]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    file = AnswerFile(path, HEADER, 5, 2)
    assert file.next_chunk == range(2)
    while not file.is_whole:
        file.append([[make(i), make(10 + i, 7)] for i in file.next_chunk])
    again = AnswerFile(path, HEADER, 5, 2)
    assert again.is_whole
    assert same(file, again)
    assert path.stat().st_size < 100 + 5 * (60 + 10 * (8 + bytes_per_token(2)))


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_chunk_that_was_cut_short_is_asked_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    file = AnswerFile(path, HEADER, 5, 2)
    for _ in range(2):
        file.append([[make(i)] for i in file.next_chunk])
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = AnswerFile(path, HEADER, 5, 2)
    assert again.next_chunk == range(2, 4)
    again.append([[make(i)] for i in again.next_chunk])
    assert path.read_bytes() == whole


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    AnswerFile(path, HEADER, 5, 2)
    with pytest.raises(PedroError, match=r"other questions \(top_k differ\); --force"):
        AnswerFile(path, HEADER | {"top_k": 3}, 5, 2)
    path.write_bytes(b"no answers")
    with pytest.raises(PedroError, match="expected a teacher's answers"):
        AnswerFile(path, HEADER, 5, 2)
