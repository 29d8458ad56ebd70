"""Prompts that a teacher makes up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Run
from tiny_task import make_backbone, make_tokenizer, write_rows

from vllm_pedro.distill.engine import Sampling, TransformersTeacher
from vllm_pedro.distill.sampling import Beginning, read_beginnings, sample_prompts
from vllm_pedro.errors import PedroError

TOKENIZER = make_tokenizer()


def test_beginnings(tmp_path: Path) -> None:
    assert read_beginnings(None, TOKENIZER) == [Beginning("<|user|>", is_chat=True)]
    rows: list[dict[str, Any]] = [{"prompt": "Review:", "end": "\nSentiment:"}, {"prompt": "Q:"}]
    path = write_rows(tmp_path / "b.jsonl", rows)
    known = [Beginning("Review:", "\nSentiment:"), Beginning("Q:")]
    assert read_beginnings(str(path), TOKENIZER) == known
    for text, said in (("", "found none"), ('{"end": "x"}', "line 1: expected texts 'prompt'")):
        path.write_text(text)
        with pytest.raises(PedroError, match=said):
            read_beginnings(str(path), TOKENIZER)
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(PedroError, match="no chat template; give beginnings"):
        read_beginnings(None, plain)


def test_rows_of_what_a_teacher_writes() -> None:
    ended = Beginning("Review:", "\nSentiment:")
    want = {"prompt": "Review: fine\nSentiment:"}
    assert ended.row(" fine\nSentiment: positive") == want
    assert ended.row(" fine \nand so on") == want
    assert ended.row(" fine, but it never ends") is None
    assert ended.row("\n") is None
    assert Beginning("Q:").row(" why? ") == {"prompt": "Q: why?"}
    chat = Beginning("<|user|>", is_chat=True)
    assert chat.row(" Hi\n") == {"messages": [{"role": "user", "content": "Hi"}]}


def test_each_prompt_once_and_the_same_by_the_same_seed() -> None:
    engine = TransformersTeacher(make_backbone(), 0, [2])
    known = [Beginning("a", ":"), Beginning("b")]
    how = Sampling(12, 1.0, 1)

    def sample(seed: int) -> list[dict[str, Any]]:
        torch.manual_seed(seed + 5)  # whatever came before
        return sample_prompts(engine.answer, "", TOKENIZER, known, 40, how, seed)

    found = sample(3)
    assert len(found) == 40
    assert len({row["prompt"] for row in found}) == 40
    assert {row["prompt"][0] for row in found} == {"a", "b"}
    assert all(row["prompt"][-1] == ":" for row in found if row["prompt"][0] == "a")
    assert sample(3) == found != sample(4)


def test_a_student_of_sampled_prompts(
    folder: Path, lora_teacher: Path, tmp_path: Path, run: Run
) -> None:
    output = tmp_path / "out"
    argv = [
        *("distill", "--model", folder, "--teacher", lora_teacher, "--sample-prompts", 30),
        *("--output", output, "--engine", "transformers", "--max-new-tokens", 6, "--r", 4),
        *("--max-steps", 2, "--use-cpu", "true"),
    ]
    status, out, err = run(*argv)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["prompts"] == {"train": 24, "dev": 3, "test": 3}
    (kept,) = output.glob("prompts-*.jsonl")
    assert len(kept.read_text().splitlines()) == 30
    assert "sampled 30/30" not in run(*argv, "--resume")[2]
    for more, said in (
        (["--prompts", kept], "expected either --prompts or"),
        (["--sample-prompts", 0, "--beginnings", kept], "expected either --prompts or"),
        (["--sample-prompts", 0, "--beginnings", kept, "--prompts", kept], "--beginnings: only"),
    ):
        status, _, err = run(*argv, "--force", *more)
        assert (status, said in err.splitlines()[-1]) == (2, True)
