import pytest

from vllm_pedro.serving.plan import Prefill, Reader, ScheduledRow, Segment, plan_step

PROMPTS = {"a": ("A", 5), "b": ("B", 1), "c": ("A", 3)}


def readers(made):
    """Rows 1, 2, 3 for a, b, c; ``made`` names those whose vectors are there."""
    return {
        name: Reader(digest, length, slot, name in made)
        for slot, (name, (digest, length)) in enumerate(PROMPTS.items(), start=1)
    }


def plan(rows, made=()):
    return plan_step(rows, readers(made).get)


# One table for every runner: rows, whose vectors are there, expected segments and prefills.
CASES = {
    "nothing scheduled": ([], [], [], []),
    "base row": ([ScheduledRow("x", 0, 7, 0)], [], [], []),
    "whole prompt": (
        [ScheduledRow("a", 0, 5, 0)],
        [],
        [Segment(0, 5, 1)],
        [Prefill("a", 0, 5, 1, "A")],
    ),
    "one-token prompt looks like a decode": (
        [ScheduledRow("b", 0, 1, 0)],
        [],
        [Segment(0, 1, 2)],
        [Prefill("b", 0, 1, 2, "B")],
    ),
    "cache hit up to the last token looks like a decode": (
        [ScheduledRow("a", 0, 1, 4)],
        [],
        [Segment(0, 1, 1)],
        [Prefill("a", 0, 1, 1, "A")],
    ),
    "cache hit of a part": (
        [ScheduledRow("x", 0, 2, 9), ScheduledRow("a", 2, 3, 2)],
        [],
        [Segment(2, 3, 1)],
        [Prefill("a", 2, 3, 1, "A")],
    ),
    "tokens past P come in the same step": (
        [ScheduledRow("a", 0, 9, 0)],
        [],
        [Segment(0, 9, 1)],
        [Prefill("a", 0, 5, 1, "A")],
    ),
    "decode": ([ScheduledRow("a", 0, 1, 5)], ["a"], [Segment(0, 1, 1)], []),
    "chunk past P": ([ScheduledRow("a", 0, 4, 6)], ["a"], [Segment(0, 4, 1)], []),
    "speculative tokens": ([ScheduledRow("a", 0, 4, 8)], ["a"], [Segment(0, 4, 1)], []),
    "mixed batch": (
        [
            ScheduledRow("x", 0, 1, 3),
            ScheduledRow("a", 1, 1, 7),
            ScheduledRow("b", 2, 1, 0),
            ScheduledRow("c", 3, 3, 0),
            ScheduledRow("y", 6, 8, 0),
        ],
        ["a"],
        [Segment(1, 1, 1), Segment(2, 1, 2), Segment(3, 3, 3)],
        [Prefill("b", 2, 1, 2, "B"), Prefill("c", 3, 3, 3, "A")],
    ),
    "kept vectors: the prompt may come in parts": (
        [ScheduledRow("a", 0, 2, 1)],
        ["a"],
        [Segment(0, 2, 1)],
        [],
    ),
    "resumed after preemption, outputs included": (
        [ScheduledRow("a", 0, 12, 0)],
        [],
        [Segment(0, 12, 1)],
        [Prefill("a", 0, 5, 1, "A")],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_plan(name):
    rows, made, segments, prefills = CASES[name]
    step = plan(rows, made)
    assert step.segments == segments
    assert step.prefills == prefills
    assert step.num_tokens == sum(r.num_tokens for r in rows)


def test_vectors_are_made_once():
    known = readers([])
    assert plan_step([ScheduledRow("a", 0, 5, 0)], known.get).prefills
    assert not plan_step([ScheduledRow("a", 0, 1, 5)], known.get).prefills


def test_split_prompt_is_a_defect():
    with pytest.raises(RuntimeError, match=r"'a' was split: 3 tokens after 0, but its first 5"):
        plan([ScheduledRow("a", 0, 3, 0)])


@pytest.mark.parametrize(("tokens", "computed"), [(1, 5), (4, 9)])
def test_a_row_without_vectors_is_a_defect(tokens, computed):
    with pytest.raises(RuntimeError, match="without vectors: its pooled token 4"):
        plan([ScheduledRow("a", 0, tokens, computed)])
