"""One table of engine steps for the plan and for both model runners."""

from __future__ import annotations

from typing import NamedTuple

from vllm_pedro.serving.plan import Prefill


class ScheduledRow(NamedTuple):
    """A request's share of a step."""

    request_id: str
    start: int
    num_tokens: int
    num_computed: int


# Digest and P of the requests with an adapter, and their rows of the store; others have none.
PROMPTS = {"a": ("A", 5), "b": ("B", 1), "c": ("A", 3)}
ROWS = {"a": 1, "b": 2, "c": 3}

# Rows, whose vectors are there, rows of the store that are read, and prefills.
CASES = {
    "nothing scheduled": ([], [], [], []),
    "base row": ([ScheduledRow("x", 0, 7, 0)], [], [], []),
    "whole prompt": (
        [ScheduledRow("a", 0, 5, 0)],
        [],
        [1],
        [Prefill("a", 0, 5, 1, "A")],
    ),
    "one-token prompt looks like a decode": (
        [ScheduledRow("b", 0, 1, 0)],
        [],
        [2],
        [Prefill("b", 0, 1, 2, "B")],
    ),
    "cache hit up to the last token looks like a decode": (
        [ScheduledRow("a", 0, 1, 4)],
        [],
        [1],
        [Prefill("a", 0, 1, 1, "A")],
    ),
    "cache hit of a part": (
        [ScheduledRow("x", 0, 2, 9), ScheduledRow("a", 2, 3, 2)],
        [],
        [1],
        [Prefill("a", 2, 3, 1, "A")],
    ),
    "tokens past P come in the same step": (
        [ScheduledRow("a", 0, 9, 0)],
        [],
        [1],
        [Prefill("a", 0, 5, 1, "A")],
    ),
    "decode": ([ScheduledRow("a", 0, 1, 5)], ["a"], [1], []),
    "chunk past P": ([ScheduledRow("a", 0, 4, 6)], ["a"], [1], []),
    "speculative tokens": ([ScheduledRow("a", 0, 4, 8)], ["a"], [1], []),
    "mixed batch": (
        [
            ScheduledRow("x", 0, 1, 3),
            ScheduledRow("a", 1, 1, 7),
            ScheduledRow("b", 2, 1, 0),
            ScheduledRow("c", 3, 3, 0),
            ScheduledRow("y", 6, 8, 0),
        ],
        ["a"],
        [1, 2, 3],
        [Prefill("b", 2, 1, 2, "B"), Prefill("c", 3, 3, 3, "A")],
    ),
    "cached vectors: the prompt may come in parts": (
        [ScheduledRow("a", 0, 2, 1)],
        ["a"],
        [1],
        [],
    ),
    "resumed after preemption, outputs included": (
        [ScheduledRow("a", 0, 12, 0)],
        [],
        [1],
        [Prefill("a", 0, 5, 1, "A")],
    ),
}
