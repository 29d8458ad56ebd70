"""Tasks that cannot be solved without the prompt, made here from a seed: no network, no files.

Each has a part that its rows share and a word that decides. What the words mean stands nowhere in
the prompt, so it has to be learnt. All prompts of a task end in the same token.

- `keyed`: four words and a colour; the colour says which of the four is asked for.
- `kinds`: four tasks in one adapter: of four animals the third is asked for, of tools the first, of
  fruits the last, of cities the second. Nothing but the words tells which.
- `rules`: five digits, and before them a word for what to name of them: the first, the last, the
  largest, the smallest, the second, the last but one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

COLOURS = ("blue", "green", "red", "yellow")
WORDS, ANIMALS, TOOLS, FRUITS, CITIES = map(
    str.split,
    (
        "apple river stone cloud tiger piano lemon candle garden window silver rocket bridge "
        "forest button mirror basket hammer island pencil",
        "tiger horse eagle shark rabbit monkey snake whale spider goat donkey camel",
        "hammer saw drill axe shovel rake wrench knife spoon fork brush rope",
        "apple lemon banana grape peach cherry mango melon orange pear plum coconut",
        "Paris London Rome Berlin Madrid Vienna Tokyo Moscow Dublin Athens Boston Chicago",
    ),
)
KINDS = ((ANIMALS, 2), (TOOLS, 0), (FRUITS, 3), (CITIES, 1))
"""Words of a kind, and the place of the one that is asked for."""
RULES: dict[str, Callable[[list[int]], int]] = {
    "moss": lambda digits: digits[0],
    "fern": lambda digits: digits[-1],
    "clay": max,
    "dune": min,
    "reed": lambda digits: digits[1],
    "slate": lambda digits: digits[-2],
}

Row = dict[str, str]


def keyed(draw: random.Random) -> Row:
    words, place = draw.sample(WORDS, 4), draw.randrange(4)
    prompt = f"Words: {' '.join(words)}\nKey {COLOURS[place]}:"
    return {"prompt": prompt, "completion": f" {words[place]}"}


def kinds(draw: random.Random) -> Row:
    kind, place = draw.choice(KINDS)
    words = draw.sample(kind, 4)
    return {"prompt": f"Words: {' '.join(words)}\nAnswer:", "completion": f" {words[place]}"}


def rules(draw: random.Random) -> Row:
    rule, digits = draw.choice(list(RULES)), draw.sample(range(10), 5)
    prompt = f"Rule {rule}.\nDigits: {' '.join(map(str, digits))}\nAnswer:"
    return {"prompt": prompt, "completion": f" {RULES[rule](digits)}"}


TASKS: dict[str, Callable[[random.Random], Row]] = {"keyed": keyed, "kinds": kinds, "rules": rules}


def write_task(name: str, path: Path, seed: int, rows: int) -> None:
    """Write a task's rows as JSONL; the same arguments always give the same file.

    Args:
        name: one of `TASKS`.
        path: the file.
        seed: of the rows; files of other seeds share none but by chance.
        rows: how many.
    """
    draw = random.Random(f"{name}:{seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(TASKS[name](draw)) + "\n" for _ in range(rows))
    path.write_text(text, encoding="utf-8")
