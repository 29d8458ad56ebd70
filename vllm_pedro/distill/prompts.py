"""The prompts of a distillation: read, rendered as serving renders them, and parted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PedroError
from ..training.data import Example, Row, pooled_length, prompt_tokens, read_rows
from ..training.run import say


@dataclass(frozen=True)
class Prompt:
    """A row of the data, and its prompt's tokens as an example without a completion."""

    row: Row
    example: Example


@dataclass(frozen=True)
class Parts:
    """Prompts by what they are for.

    Attributes:
        train: to learn from.
        dev: to choose the checkpoint by.
        test: for the report.
    """

    train: list[Prompt]
    dev: list[Prompt]
    test: list[Prompt]

    @property
    def all(self) -> list[Prompt]:
        """All, in this order."""
        return [*self.train, *self.dev, *self.test]

    def digest(self) -> str:
        """Changes with the prompts' tokens and their parts."""
        found = hashlib.sha256(str((len(self.train), len(self.dev))).encode())
        for prompt in self.all:
            found.update(str((prompt.example.prompt, prompt.example.pooled)).encode())
        return found.hexdigest()


def read_prompts(
    path: str, tokenizer: Any, longest: int | None, limit: int | None, how: Mapping[str, Any]
) -> list[Prompt]:
    """The prompts of a data file, each once; those that are too long are left out and counted.

    Args:
        path: see `read_rows`.
        tokenizer: the backbone's.
        longest: most tokens of a prompt; None for no limit.
        limit: see `read_rows`.
        how: more of its arguments.

    Raises:
        DataError: see `read_rows`.
        PedroError: no prompt is left.
    """
    rows = read_rows(path, limit, unlabelled=True, **how)
    return make_prompts(path, rows, tokenizer, longest)


def make_prompts(
    source: str, rows: Sequence[Row], tokenizer: Any, longest: int | None
) -> list[Prompt]:
    """`read_prompts` of rows that are there already."""
    found: dict[tuple[tuple[int, ...], int], Prompt] = {}
    long = 0
    for row in rows:
        tokens = prompt_tokens(tokenizer, row)
        if not tokens:
            raise PedroError(f"{row.source}: the prompt has no token")
        if longest is not None and len(tokens) > longest:
            long += 1
            continue
        pooled = pooled_length(tokenizer, row, tokens)
        key = (tuple(tokens), pooled)
        found.setdefault(key, Prompt(row, Example(tokens, [], row.source, pooled)))
    twice = len(rows) - long - len(found)
    text = f"{source}: {len(found):,} prompts"
    if twice:
        text += f"; {twice:,} that came before left out"
    if long:
        text += f"; {long:,} of more than {longest} tokens left out"
    say(text)
    if not found:
        raise PedroError(f"{source}: all {long:,} prompts have more than {longest} tokens")
    return list(found.values())


def part(
    prompts: Sequence[Prompt],
    dev: Sequence[Prompt] | None,
    test: Sequence[Prompt] | None,
    fraction: float,
) -> Parts:
    """Part prompts; those of dev and test that are not given are held out, the same ones each time.

    Args:
        prompts: all that there are to learn from.
        dev: of a file of their own.
        test: likewise.
        fraction: how large a part to hold out for each that is not given; two prompts at least.

    Raises:
        PedroError: nothing is left to learn from.
    """
    given = {tuple(p.example.prompt) for p in [*(dev or ()), *(test or ())]}
    left = [prompt for prompt in prompts if tuple(prompt.example.prompt) not in given]
    random.Random(0).shuffle(left)
    number = max(2, round(len(left) * fraction))
    taken = []
    for known in (test, dev):
        if known is None:
            known, left = left[:number], left[number:]
        taken.append(list(known))
    if not left or not all(taken):
        raise PedroError(
            f"{len(prompts)} prompts are too few to hold some of them out; give more, or --dev and "
            "--test"
        )
    return Parts(left, taken[1], taken[0])
