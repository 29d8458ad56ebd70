"""From a JSONL file to tokens: rows are read, checked and split into prompt and completion.

A row is `{"prompt": TEXT, "completion": TEXT}` or a chat, `{"messages": [...]}`, whose last message
is the assistant's and is the completion. Other keys may stand beside them.

The tokens of a prompt are exactly those that serving makes of the same text: of a plain prompt
what the tokenizer gives, special tokens and all; of a chat what the chat template gives with the
generation prompt at its end. The adapter pools these tokens, so one token more or less would train
it for states that it never meets again.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import PedroError
from ..files import shorten


class DataError(PedroError):
    """Training or evaluation data that cannot be used; names the file, the line and the fault."""


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        source: file and line, for messages.
        prompt: the prompt's text, or the messages before the last one.
        completion: the text to learn.
        fields: the whole row.
        pools_first_turn: of a chat's prompt only the first turn's is pooled.
    """

    source: str
    prompt: str | list[dict[str, str]]
    completion: str
    fields: dict[str, Any] = field(repr=False, default_factory=dict)
    pools_first_turn: bool = False

    @property
    def answers(self) -> list[str]:
        """Every answer that counts as right: `answers` if the row has it, else the completion."""
        answers = self.fields.get("answers")
        if isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers):
            return answers
        return [self.completion]


@dataclass(frozen=True)
class Example:
    """A tokenised row.

    Attributes:
        prompt: the prompt's token ids.
        completion: the completion's, with the token that ends it; all of them are learnt.
        source: file and line.
        pooled: how many of the prompt's first tokens are pooled; 0 for all.
    """

    prompt: list[int]
    completion: list[int]
    source: str = ""
    pooled: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    @property
    def prompt_length(self) -> int:
        """P, the number of tokens that are pooled."""
        return self.pooled or len(self.prompt)


def read_rows(
    path: str | os.PathLike[str], limit: int | None = None, prompt_length: str = "whole"
) -> list[Row]:
    """Read a JSONL file, or one compressed by gzip (`.gz`).

    Args:
        path: the file.
        limit: read no more than this many rows, from the top.
        prompt_length: one of `PROMPT_LENGTHS`, what is pooled of a chat.

    Raises:
        DataError: the file cannot be read, has no rows, or has a bad one.
    """
    rows: list[Row] = []
    for source, text in _lines(path):
        if limit is not None and len(rows) >= limit:
            break
        row = _parse(source, text)
        is_first = prompt_length == "first_turn"
        rows.append(dataclasses.replace(row, pools_first_turn=True) if is_first else row)
    if not rows:
        raise DataError(f"{path}: expected at least one row, found none")
    return rows


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its file and number."""
    file = Path(path)
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                source = f"{file}, line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{source}: expected UTF-8, found {error}") from None
                if text.strip():
                    yield source, text
    except (OSError, EOFError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{file}: expected a JSONL file, found: {found}") from None


def _parse(source: str, text: str) -> Row:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{source}: expected one JSON object, found invalid JSON: {error}"
        ) from None
    if not isinstance(values, dict):
        raise DataError(f"{source}: expected a JSON object, found {type(values).__name__}")
    has_messages = "messages" in values
    if has_messages == ("prompt" in values or "completion" in values):
        raise DataError(
            f"{source}: expected 'prompt' and 'completion', or 'messages', found the keys "
            f"{shorten(sorted(values), 10) or 'none'}"
        )
    if has_messages:
        return _chat(source, values)
    for key in ("prompt", "completion"):
        if not isinstance(values.get(key), str):
            found = type(values[key]).__name__ if key in values else "no such key"
            raise DataError(f"{source}: '{key}': expected text, found {found}")
        if not values[key]:
            raise DataError(f"{source}: '{key}': expected text, found an empty string")
    return Row(source, values["prompt"], values["completion"], values)


def _chat(source: str, values: dict[str, Any]) -> Row:
    messages = values["messages"]
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(
            f"{source}: 'messages': expected a list of two or more, the last one the assistant's"
        )
    for number, message in enumerate(messages, 1):
        where = f"{source}: message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{where}: expected an object, found {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = type(message[key]).__name__ if key in message else "no such key"
                raise DataError(f"{where}: '{key}': expected text, found {found}")
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        raise DataError(
            f"{source}: the last message is what is learnt: expected role 'assistant' and some "
            f"content, found role {messages[-1]['role']!r} and {len(messages[-1]['content'])} "
            "characters"
        )
    return Row(source, messages[:-1], messages[-1]["content"], values)


def prompt_tokens(tokenizer: Any, row: Row) -> list[int]:
    """The prompt's token ids, as serving makes them."""
    if isinstance(row.prompt, str):
        return list(tokenizer(row.prompt)["input_ids"])
    return _template(tokenizer, row, row.prompt, add_generation_prompt=True)


def pooled_length(tokenizer: Any, row: Row, prompt: Sequence[int]) -> int:
    """How many of a prompt's tokens are pooled, as serving makes it of "first_turn".

    Args:
        tokenizer: the backbone's.
        row: the row.
        prompt: its prompt's tokens.
    """
    if not row.pools_first_turn or isinstance(row.prompt, str):
        return len(prompt)
    roles = [message["role"] for message in row.prompt]
    if "user" not in roles:
        return len(prompt)
    messages = row.prompt[: roles.index("user") + 1]
    first = _template(tokenizer, row, messages, add_generation_prompt=True)
    return len(first) if prompt[: len(first)] == first else len(prompt)


def _template(tokenizer: Any, row: Row, messages: Any, **how: Any) -> list[int]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            f"{row.source}: 'messages', but the model's tokenizer has no chat template; give "
            "'prompt' and 'completion'"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # a template may raise anything; it is a program in the model
        raise DataError(f"{row.source}: the model's chat template refuses it: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(tokenizer: Any, row: Row) -> Example:
    """Tokenise a row.

    The completion's tokens are those that prompt and completion get together, where they begin
    with the prompt's own; otherwise the two are tokenised apart, as generation would have it. It
    ends with the tokenizer's end-of-sequence token, so that a trained model stops.

    Raises:
        DataError: the prompt or the completion has no token, or the chat template does not write
            the last message after the others.
    """
    prompt = prompt_tokens(tokenizer, row)
    eos = tokenizer.eos_token_id
    if not isinstance(row.prompt, str):
        messages = [*row.prompt, {"role": "assistant", "content": row.completion}]
        whole = _template(tokenizer, row, messages)
        if whole[: len(prompt)] != prompt:
            raise DataError(
                f"{row.source}: the model's chat template does not write the last message right "
                "after the generation prompt, so prompt and completion cannot be told apart; give "
                "'prompt' and 'completion'"
            )
        completion = whole[len(prompt) :]
        if eos in completion:
            # What a template writes after the end of the turn is never generated.
            completion = completion[: len(completion) - completion[::-1].index(eos)]
    else:
        whole = list(tokenizer(row.prompt + row.completion)["input_ids"])
        if whole[: len(prompt)] == prompt:
            completion = whole[len(prompt) :]
        else:
            completion = list(tokenizer(row.completion, add_special_tokens=False)["input_ids"])
    if not prompt or not completion:
        part = "completion" if prompt else "prompt"
        raise DataError(f"{row.source}: the {part} has no token")
    if eos is not None and completion[-1] != eos:
        completion = [*completion, eos]
    return Example(prompt, completion, row.source, pooled_length(tokenizer, row, prompt))


@dataclass(frozen=True)
class Dataset(Sequence[Example]):
    """Tokenised rows, and how many were left out for their length."""

    examples: list[Example]
    too_long: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]


def held_out_split(number: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the rows to keep and of those to hold out, drawn by `seed`, both ascending.

    Raises:
        DataError: one of the two would be empty.
    """
    held_number = round(number * fraction)
    if not 0 < held_number < number:
        raise DataError(f"{number} rows: holding out {fraction:g} of them leaves one part empty")
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_number:]), sorted(order[:held_number])


def load_dataset(
    path: str | os.PathLike[str],
    tokenizer: Any,
    max_length: int | None = None,
    limit: int | None = None,
    prompt_length: str = "whole",
) -> Dataset:
    """Read and tokenise a data file.

    Args:
        path: a JSONL file, or one compressed by gzip.
        tokenizer: the backbone's.
        max_length: rows of more tokens are left out, and counted. They are not cut: a cut prompt is
            not the one that serving would pool.
        limit: read no more than this many rows.
        prompt_length: one of `PROMPT_LENGTHS`, what is pooled of a chat.

    Raises:
        DataError: see `read_rows` and `encode`; or every row is too long.
    """
    examples = [encode(tokenizer, row) for row in read_rows(path, limit, prompt_length)]
    short = [e for e in examples if max_length is None or len(e) <= max_length]
    if not short:
        raise DataError(
            f"{path}: all {len(examples)} rows have more than {max_length} tokens; the shortest "
            f"has {min(map(len, examples))}"
        )
    return Dataset(short, len(examples) - len(short))
