"""Tasks that cannot be solved without the prompt, made here from a seed: no network, no files.

Each has a part that its rows share and a word that decides; the answer is one of words that stand
in the prompt, or one of two, so that vectors which are the same for every prompt can only help the
backbone to do the deciding itself. All prompts of a task end in the same token.

- `keyed`: four words and a colour; the colour says which of the four is asked for.
- `two-tasks`: two tasks in one adapter: of four animals the first is asked for, of four fruits the
  last. Nothing but the words tells which.
- `flip`: an opinion, and an instruction to name its feeling or the opposite of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

COLOURS = ("blue", "green", "red", "yellow")
WORDS, ANIMALS, FRUITS, THINGS, GOOD, BAD = map(
    str.split,
    (
        "apple river stone cloud tiger piano lemon candle garden window silver rocket bridge "
        "forest button mirror basket hammer island pencil",
        "tiger horse eagle shark rabbit monkey snake whale spider goat donkey camel",
        "apple lemon banana grape peach cherry mango melon orange pear plum coconut",
        "soup film hotel book concert garden dinner trip show lesson car song",
        "wonderful excellent lovely brilliant delightful superb perfect great",
        "terrible awful boring horrible dreadful poor disappointing bad",
    ),
)

Row = dict[str, str]


def keyed(draw: random.Random) -> Row:
    words, place = draw.sample(WORDS, 4), draw.randrange(4)
    prompt = f"Words: {' '.join(words)}\nKey {COLOURS[place]}:"
    return {"prompt": prompt, "completion": f" {words[place]}"}


def two_tasks(draw: random.Random) -> Row:
    kind, place = draw.choice(((ANIMALS, 0), (FRUITS, -1)))
    words = draw.sample(kind, 4)
    return {"prompt": f"Words: {' '.join(words)}\nAnswer:", "completion": f" {words[place]}"}


def flip(draw: random.Random) -> Row:
    is_good, is_opposite = draw.random() < 0.5, draw.random() < 0.5
    thing, word = draw.choice(THINGS), draw.choice(GOOD if is_good else BAD)
    rule = "the opposite" if is_opposite else "the feeling"
    answer = "positive" if is_good != is_opposite else "negative"
    prompt = f"Review: The {thing} was {word}.\nName {rule}.\nAnswer:"
    return {"prompt": prompt, "completion": f" {answer}"}


TASKS: dict[str, Callable[[random.Random], Row]] = {
    "keyed": keyed,
    "two-tasks": two_tasks,
    "flip": flip,
}


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
