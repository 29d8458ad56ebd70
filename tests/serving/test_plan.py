import pytest
from step_cases import CASES, PROMPTS, ROWS, ScheduledRow

from vllm_pedro.serving.plan import Pending, Prefill, plan_step


def plan(rows, made=()):
    """Rows 1, 2, 3 for a, b, c; `made` names those whose vectors are there."""
    return plan_step(
        [r.request_id for r in rows],
        [ROWS.get(r.request_id, 0) for r in rows],
        [r.num_tokens for r in rows],
        [r.num_computed for r in rows],
        {name: Pending(*PROMPTS[name]) for name in PROMPTS if name not in made},
    )


@pytest.mark.parametrize("name", CASES)
def test_plan(name):
    rows, made, read, prefills = CASES[name]
    step = plan(rows, made)
    assert [r for r in step.store_rows if r] == read
    assert step.prefills == prefills
    assert step.num_tokens == sum(r.num_tokens for r in rows)
    assert step.num_with_adapter == len(read)


def test_split_prompt_is_a_defect():
    with pytest.raises(RuntimeError, match=r"'a' was split: 3 tokens after 0, but its first 5"):
        plan([ScheduledRow("a", 0, 3, 0)])


@pytest.mark.parametrize(("tokens", "computed"), [(1, 5), (4, 9)])
def test_a_row_without_vectors_is_a_defect(tokens, computed):
    with pytest.raises(RuntimeError, match="without vectors: its pooled token 4"):
        plan([ScheduledRow("a", 0, tokens, computed)])


def test_tokens_that_are_not_scaled_read_the_identity() -> None:
    """Scope "answer": of "b" tokens 3 and 4 come before the pooled one, token 5."""
    plan = plan_step(
        ["a", "b", "c", "d"],
        [3, 4, 0, 5],
        [2, 5, 4, 1],
        [7, 3, 0, 9],
        {"b": Pending("digest", 6, is_answer=True)},
        [0, 5, 0, 4],
    )
    assert plan.store_rows.tolist() == [3, 0, 4, 0, 5]
    assert plan.lengths.tolist() == [2, 2, 3, 4, 1]
    assert plan.num_tokens == 12
    assert plan.prefills == [Prefill("b", 4, 1, 4, "digest")]


def test_static_vectors_are_generated_wherever_a_request_is():
    plan = plan_step(
        ["a", "b"], [1, 2], [3, 4], [0, 50],
        {"b": Pending("digest", 0)},
    )  # fmt: skip
    assert [(p.request_id, p.row, p.length) for p in plan.prefills] == [("b", 2, 1)]
