"""From a data file to tokens: rows are read, checked and split into prompt and completion.

A row is `{"prompt": TEXT, "completion": TEXT}` or a chat, `{"messages": [...]}`, whose last message
is the assistant's and is the completion; so is a chat as `{"prompt": [...], "completion": [...]}`,
TRL's form. `tools` and `chat_template_kwargs` may stand beside a chat's messages, and other keys
beside both.

The tokens of a prompt are exactly those that serving makes of the same text: of a plain prompt
what the tokenizer gives, special tokens and all; of a chat what the chat template gives with the
generation prompt at its end. The adapter pools these tokens, so one token more or less would train
it for states that it never meets again.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import AdapterError, first_line
from ..files import parse_json_object, shorten
from .chat import (
    DataError,
    Message,
    check_messages,
    check_template_options,
    check_tools,
    render_chat,
)

__all__ = [
    "DataError",
    "Dataset",
    "Example",
    "Row",
    "answers_of",
    "encode",
    "held_out_split",
    "load_dataset",
    "pooled_length",
    "prompt_tokens",
    "read_rows",
]


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        source: file and line, for messages.
        prompt: the prompt's text, or the messages before the last one.
        completion: the text to learn; of a chat the last message's content. Empty in a row without
            one, where `read_rows` takes such rows.
        fields: the whole row.
        pools_first_turn: of a chat's prompt only the first turn's is pooled.
        answer: a chat's last message, where it is more than `completion`.
        tools: the tools that the chat template is given.
        options: what else it is given, `chat_template_kwargs`.
        end_tokens: what ends generation besides the tokenizer's end-of-sequence token: the
            `eos_token_id` of the model's generation config.
    """

    source: str
    prompt: str | list[Message]
    completion: str
    fields: dict[str, Any] = field(repr=False, default_factory=dict)
    pools_first_turn: bool = False
    answer: Message | None = None
    tools: list[dict[str, Any]] | None = field(repr=False, default=None)
    options: Mapping[str, Any] = field(repr=False, default_factory=dict)
    end_tokens: Sequence[int] = ()

    @property
    def is_labelled(self) -> bool:
        """Whether there is anything to learn in the row, or to score an answer by."""
        return bool(self.completion) or self.answer is not None

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
    path: str | os.PathLike[str],
    limit: int | None = None,
    prompt_length: str = "whole",
    all_turns: bool = False,
    options: Mapping[str, Any] | None = None,
    end_tokens: Sequence[int] = (),
    unlabelled: bool = False,
) -> list[Row]:
    """Read a data file.

    Args:
        path: JSONL, also compressed by gzip (`.gz`); CSV (`.csv`, `.tsv`) with the columns `prompt`
            and `completion`; Parquet (`.parquet`); a folder that `datasets` saved; or "-", JSONL
            from standard input.
        limit: read no more than this many rows of the file, from the top.
        prompt_length: one of `PROMPT_LENGTHS`, what is pooled of a chat.
        all_turns: make a row of each turn of the assistant in a chat, not of the last alone.
        options: `chat_template_kwargs` of chats that do not say otherwise.
        end_tokens: see `Row`.
        unlabelled: take rows without a completion, too, and chats that do not end in an answer.

    Raises:
        DataError: the file cannot be read, has no rows, or has a bad one.
    """
    options = check_template_options(str(path), options)
    how = _How(prompt_length == "first_turn", all_turns, options, end_tokens, unlabelled)
    rows: list[Row] = []
    for number, (source, values) in enumerate(_records(path)):
        if limit is not None and number >= limit:
            break
        rows += _parse(source, values, how)
    if not rows:
        raise DataError(f"{path}: expected at least one row, found none")
    return rows


@dataclass(frozen=True)
class _How:
    pools_first_turn: bool
    all_turns: bool
    options: Mapping[str, Any]
    end_tokens: Sequence[int]
    unlabelled: bool


def _records(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as they are in a file, each with its file and place."""
    file = Path(path)
    if file.is_dir() or file.suffix == ".parquet":
        for number, values in enumerate(_table(file), 1):
            yield f"{file}, row {number}", values
    elif file.suffix in (".csv", ".tsv"):
        yield from _csv(file)
    else:
        for source, text in _lines(path):
            yield source, _json(source, text)


def _table(file: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{file}: reading it needs datasets: pip install datasets") from error
    try:
        if file.is_dir():
            found = datasets.load_from_disk(str(file))
        else:
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
    except Exception as error:  # of pyarrow's, fsspec's or datasets' own kinds
        raise DataError(f"{file}: cannot read it as a data set: {first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        raise DataError(f"{file}: expected one data set, found {shorten(sorted(found))}; name one")
    return found


def _csv(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(file) as stream:
        try:
            text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
            reader = csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ",")
            for row in reader:
                source = f"{file}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{source}: expected {len(reader.fieldnames or ())} columns")
                yield source, dict(row)
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file}: expected CSV in UTF-8, found {error}") from None


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    try:
        if str(file) == "-":
            yield sys.stdin.buffer
        else:
            with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as stream:
                yield stream  # type: ignore[misc]  # GzipFile reads as any other
    except (OSError, EOFError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{file}: expected a data file, found: {found}") from None


def _lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its file and number."""
    with _opened(Path(path)) as stream:
        for number, line in enumerate(stream, 1):
            source = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{source}: expected UTF-8, found {error}") from None
            if text.strip():
                yield source, text


def _json(source: str, text: str) -> dict[str, Any]:
    if text.lstrip().startswith("["):
        raise DataError(
            f"{source}: expected a JSON object, found list; jq -c '.[]' writes an array's objects "
            "one a line"
        )
    try:
        values = parse_json_object(text.encode(), source)
    except AdapterError as error:
        hint = "; jq -c . writes an object of several lines in one" if text.strip() == "{" else ""
        raise DataError(f"{error}{hint}") from None
    if "\\ud" in text.lower():
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{source}: expected text, found half of a surrogate pair (\\ud800 to \\udfff)"
            ) from None
    return values


def _parse(source: str, values: dict[str, Any], how: _How) -> list[Row]:
    has_messages = "messages" in values
    if has_messages == ("prompt" in values or "completion" in values):
        raise DataError(
            f"{source}: expected 'prompt' and 'completion', or 'messages', found the keys "
            f"{shorten(sorted(values), 10) or 'none'}"
        )
    if has_messages:
        return _chat(source, values, check_messages(source, values["messages"]), how)
    if how.unlabelled and values.get("completion") in (None, ""):
        values = {key: value for key, value in values.items() if key != "completion"}
        if isinstance(values.get("prompt"), list):
            return _chat(source, values, check_messages(source, values["prompt"], "prompt"), how)
    if isinstance(values.get("prompt"), list) and isinstance(values.get("completion"), list):
        before = check_messages(source, values["prompt"], "prompt")
        after = check_messages(source, values["completion"], "completion")
        if len(after) != 1:
            raise DataError(
                f"{source}: 'completion': expected one message, found {len(after)}; give a chat of "
                "several turns as 'messages'"
            )
        return _chat(source, values, [*before, *after], how)
    texts: tuple[str, ...] = ("prompt", "completion")
    if how.unlabelled and "completion" not in values:
        texts = ("prompt",)
    for key in texts:
        if not isinstance(values.get(key), str):
            found = type(values[key]).__name__ if key in values else "no such key"
            raise DataError(f"{source}: '{key}': expected text, found {found}")
        if not values[key]:
            raise DataError(f"{source}: '{key}': expected text, found an empty string")
    for key in ("tools", "chat_template_kwargs"):
        if values.get(key):
            raise DataError(f"{source}: '{key}' belongs to a chat; this prompt is text")
    text = (values["prompt"], values.get("completion", ""))
    return [Row(source, *text, fields=values, end_tokens=how.end_tokens)]


def _chat(source: str, values: dict[str, Any], messages: list[Message], how: _How) -> list[Row]:
    asks = how.unlabelled and bool(messages) and messages[-1]["role"] != "assistant"
    if len(messages) < 2 and not asks:
        raise DataError(
            f"{source}: 'messages': expected a list of two or more, the last one the assistant's"
        )
    tools = check_tools(source, values.get("tools"))
    own = check_template_options(source, values.get("chat_template_kwargs"))
    if not asks and not _is_answer(messages[-1]):
        raise DataError(
            f"{source}: the last message is what is learnt: expected role 'assistant' and some "
            f"content or tool calls, found role {messages[-1]['role']!r} and "
            f"{len(messages[-1]['content'] or '')} characters"
        )
    ends = [] if asks else [len(messages) - 1]
    if how.all_turns:
        ends = [end for end in range(1, len(messages)) if _is_answer(messages[end])]
    rows = []
    for end in ends:
        content = messages[end]["content"] or ""
        text = content if isinstance(content, str) else "\n".join(content)
        is_plain = messages[end].keys() == {"role", "content"} and isinstance(content, str)
        rows.append(
            Row(
                source if end == len(messages) - 1 else f"{source}: message {end + 1}",
                messages[:end],
                text,
                values,
                how.pools_first_turn,
                None if is_plain else messages[end],
                tools,
                {**how.options, **own},
                how.end_tokens,
            )
        )
    if asks:
        rows.append(
            Row(
                source,
                messages,
                "",
                values,
                how.pools_first_turn,
                tools=tools,
                options={**how.options, **own},
                end_tokens=how.end_tokens,
            )
        )
    return rows


def answers_of(tokenizer: Any, row: Row) -> list[str]:
    """Every text that counts as right; of tool calls and reasoning, what the template writes."""
    if row.answer is None or row.fields.get("answers"):
        return row.answers
    return [str(tokenizer.decode(encode(tokenizer, row).completion, skip_special_tokens=True))]


def _is_answer(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"] or message.get("tool_calls"))


def prompt_tokens(tokenizer: Any, row: Row) -> list[int]:
    """The prompt's token ids, as serving makes them."""
    if isinstance(row.prompt, str):
        return list(tokenizer(row.prompt)["input_ids"])
    return _ids(tokenizer, _render(tokenizer, row, row.prompt, add_generation_prompt=True))


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
    first = _ids(tokenizer, _render(tokenizer, row, messages, add_generation_prompt=True))
    return len(first) if prompt[: len(first)] == first else len(prompt)


def _render(tokenizer: Any, row: Row, messages: Any, add_generation_prompt: bool = False) -> str:
    return render_chat(
        tokenizer, row.source, messages, row.tools, row.options, add_generation_prompt
    )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(tokenizer: Any, row: Row) -> Example:
    """Tokenise a row.

    The completion's tokens are those that prompt and completion get together, where they begin
    with the prompt's own; otherwise the two are tokenised apart, as generation would have it. It
    ends with the first token that ends generation; where it has none, the tokenizer's
    end-of-sequence token is put there, so that a trained model stops.

    Raises:
        DataError: the prompt or the completion has no token, or the chat template does not write
            the last message after the others.
    """
    prompt = prompt_tokens(tokenizer, row)
    eos = tokenizer.eos_token_id
    ends = {*row.end_tokens} | ({eos} if eos is not None else set())
    if not isinstance(row.prompt, str):
        answer = row.answer or {"role": "assistant", "content": row.completion}
        before = _render(tokenizer, row, row.prompt, add_generation_prompt=True)
        text = _render(tokenizer, row, [*row.prompt, answer])
        if not text.startswith(before):
            raise DataError(
                f"{row.source}: the model's chat template does not write the last message right "
                "after the generation prompt, so prompt and completion cannot be told apart; give "
                "'prompt' and 'completion' as text"
            )
        whole, rest = _ids(tokenizer, text), text[len(before) :]
    else:
        whole, rest = list(tokenizer(row.prompt + row.completion)["input_ids"]), row.completion
    is_prefix = whole[: len(prompt)] == prompt
    completion = whole[len(prompt) :] if is_prefix else _ids(tokenizer, rest)
    if not isinstance(row.prompt, str):
        # What a template writes after the end of the turn is never generated.
        end = next((place for place, token in enumerate(completion) if token in ends), None)
        completion = completion if end is None else completion[: end + 1]
    if not prompt or not completion:
        part = "completion" if prompt else "prompt"
        raise DataError(f"{row.source}: the {part} has no token")
    if eos is not None and completion[-1] not in ends:
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
    all_turns: bool = False,
    options: Mapping[str, Any] | None = None,
    end_tokens: Sequence[int] = (),
) -> Dataset:
    """Read and tokenise a data file.

    Args:
        path: see `read_rows`.
        tokenizer: the backbone's.
        max_length: rows of more tokens are left out, and counted. They are not cut: a cut prompt is
            not the one that serving would pool.
        limit: see `read_rows`, as for all that follow.
        prompt_length: one of `PROMPT_LENGTHS`.
        all_turns: a row of each turn.
        options: `chat_template_kwargs`.
        end_tokens: see `Row`.

    Raises:
        DataError: see `read_rows` and `encode`; or every row is too long.
    """
    rows = read_rows(path, limit, prompt_length, all_turns, options, end_tokens)
    examples = [encode(tokenizer, row) for row in rows]
    short = [e for e in examples if max_length is None or len(e) <= max_length]
    if not short:
        raise DataError(
            f"{path}: all {len(examples)} rows have more than {max_length} tokens; the shortest "
            f"has {min(map(len, examples))}"
        )
    return Dataset(short, len(examples) - len(short))
