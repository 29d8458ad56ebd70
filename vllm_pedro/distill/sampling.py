"""Prompts where there are none: sampled from the teacher itself.

A model with a chat template goes on from where the template has a user's message begin, as it does
when it is trained on chats (arXiv 2406.08464). Any other is given beginnings of prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import PedroError
from ..files import parse_json_object, replace_file
from ..training.chat import render_chat
from ..training.run import say
from .answers import Answer
from .engine import Question, Sampling

ROUND: Final = 64
"""Samples that are drawn at a time."""
TRIES: Final = 4
"""Times the prompts that are wanted are drawn at most; some come twice, or to nothing."""
_PROBE: Final = "\x02probe\x03"


@dataclass(frozen=True)
class Beginning:
    """How prompts begin and end.

    Attributes:
        text: what the teacher goes on from.
        end: what a prompt ends with; the teacher's text is cut where it, or a new line, comes.
        is_chat: whether the teacher's text is a user's message, and `text` what stands before it.
    """

    text: str
    end: str = ""
    is_chat: bool = False

    def row(self, text: str) -> dict[str, Any] | None:
        """A row of data from what the teacher wrote; None if nothing comes of it."""
        if self.end:
            at = [place for place in (text.find(self.end), text.find("\n")) if place >= 0]
            if not at:
                return None
            text = text[: min(at)]
        if not text.strip():
            return None
        if self.is_chat:
            return {"messages": [{"role": "user", "content": text.strip()}]}
        return {"prompt": self.text + text.rstrip() + self.end}


def read_beginnings(path: str | None, tokenizer: Any) -> list[Beginning]:
    """The beginnings in a file, or that of the chat template.

    Args:
        path: lines of JSON with `prompt` and, if wanted, `end`; None for the chat template.
        tokenizer: the backbone's.

    Raises:
        PedroError: the file is empty or wrong, or there is no chat template.
    """
    if path is None:
        if tokenizer.chat_template is None:
            raise PedroError(
                "--sample-prompts: the tokenizer has no chat template; give beginnings of prompts "
                "with --beginnings"
            )
        probe = [{"role": "user", "content": _PROBE}]
        before, found, _ = render_chat(tokenizer, "--sample-prompts", probe).partition(_PROBE)
        if not found or not before:
            raise PedroError(
                "--sample-prompts: the chat template has nothing before a user's message; give "
                "beginnings of prompts with --beginnings"
            )
        return [Beginning(before, is_chat=True)]
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PedroError(f"{path}: expected beginnings of prompts, {error}") from error
    result = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        values = parse_json_object(line.encode(), source)
        text, end = values.get("prompt"), values.get("end", "")
        if not isinstance(text, str) or not text or not isinstance(end, str):
            raise PedroError(f"{source}: expected texts 'prompt' and, if wanted, 'end'")
        result.append(Beginning(text, end))
    if not result:
        raise PedroError(f"{path}: expected beginnings of prompts, found none")
    return result


def sample_prompts(
    answer: Callable[[Sequence[Question], Sampling], list[list[Answer]]],
    teacher: str,
    tokenizer: Any,
    beginnings: Sequence[Beginning],
    number: int,
    how: Sampling,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of prompts that a teacher makes up, each once.

    Args:
        answer: see `engine.Teacher`.
        teacher: its folder.
        tokenizer: the backbone's.
        beginnings: the teacher goes on from each in turn.
        number: how many are wanted.
        how: see `Sampling`.
        seed: the same one gives the same prompts.

    Raises:
        PedroError: not one came of it.
    """
    starts = [tokenizer(b.text, add_special_tokens=not b.is_chat)["input_ids"] for b in beginnings]
    found: dict[str, dict[str, Any]] = {}
    rounds = -(-number // (ROUND * len(beginnings)))
    for turn in range(rounds * TRIES):
        questions = [
            Question(start, len(start), 1 + ROUND, seed + turn * len(starts) + i, teacher)
            for i, start in enumerate(starts)
        ]
        for beginning, answers in zip(beginnings, answer(questions, how), strict=True):
            for one in answers[1:]:  # the first is the greedy one
                row = beginning.row(tokenizer.decode(one.tokens, skip_special_tokens=True))
                if row is not None:
                    found.setdefault(json.dumps(row), row)
        say(f"sampled {min(len(found), number):,}/{number:,} prompts")
        if len(found) >= number:
            break
    if not found:
        raise PedroError("--sample-prompts: nothing came of what the teacher wrote")
    return list(found.values())[:number]


def prompts_name(*settings: object) -> str:
    """The name of the file of sampled prompts, which changes with how they are sampled."""
    return f"prompts-{hashlib.sha256(str(settings).encode()).hexdigest()[:12]}.jsonl"


def write_prompts(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Keep sampled prompts as a data file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(path, lines.encode())
