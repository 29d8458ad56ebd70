import pytest

from vllm_pedro.serving.admission import PATIENCE, Admission, Turn


def waited(admission, request_id, steps):
    for _ in range(steps):
        admission.begin_step([])
        admission.pass_over(request_id)


def test_a_turn_comes_after_some_steps_and_again_after_as_many():
    admission = Admission(96, 96)
    for step in range(1, 3 * PATIENCE + 1):
        admission.pass_over("a")
        assert admission.candidates() == (["a"] if step % PATIENCE == 0 else [])
    admission.forget("a")
    assert admission.candidates() == []


def test_a_turn_that_fails_for_other_reasons_comes_again_only_later():
    """Else running rows, which hold what it lacks, would never get on."""
    admission = Admission(96, 96)
    waited(admission, "a", PATIENCE)
    turns = []
    for _ in range(3 * PATIENCE):
        admission.begin_step([Turn(i, 90, 0) for i in admission.candidates()])
        turns.append(admission.turn is not None)
        if admission.turn is None:
            admission.pass_over("a")
    assert turns == [True, *[False] * (PATIENCE - 1)] * 3


def test_who_has_waited_longest_goes_first():
    admission = Admission(96, 96)
    waited(admission, "a", PATIENCE)
    waited(admission, "b", 2 * PATIENCE)
    assert admission.candidates() == ["a", "b"]
    admission.begin_step([Turn("a", 9, 0)])  # the other one cannot run now
    assert admission.turn.request_id == "a"
    waited(admission, "a", PATIENCE - 1)
    assert admission.candidates() == ["a", "b"]
    waited(admission, "b", PATIENCE)
    admission.begin_step([Turn("a", 9, 0), Turn("b", 9, 0)])
    assert admission.turn.request_id == "b"


def test_running_rows_leave_what_the_turn_needs():
    admission = Admission(96, 96)
    waited(admission, "a", PATIENCE)
    admission.begin_step([Turn("a", 94, 0)])
    taken = []
    for tokens, is_divisible in ((1, False), (1, False), (1, False), (40, True)):
        taken.append(admission.portion(tokens, is_divisible))
        admission.take(taken[-1])
    assert taken == [1, 1, 0, 0]
    assert admission.left == 94
    admission.begin_step([Turn("a", 80, 0)])
    assert admission.portion(40, is_divisible=True) == 16
    assert admission.portion(40, is_divisible=False) == 0
    admission.begin_step([])
    assert admission.portion(40, is_divisible=False) == 40


def test_places_for_drafts_count_for_each_row():
    admission = Admission(90, 100, draft_places=3)
    assert admission.left == 90
    admission.take(1)
    assert admission.left == 89
    for _ in range(5):
        admission.take(1)
    assert admission.left == min(84, 100 - 6 * 4 - 3)
    waited(admission, "a", PATIENCE)
    admission.begin_step([Turn("a", 90, 0)])
    assert admission.portion(4, is_divisible=True) == 0
    admission.begin_step([Turn("a", 80, 0)])
    # The row and the prompt both need places.
    assert admission.portion(9, is_divisible=True) == 90 - 80 - 3


@pytest.mark.parametrize(("priority", "expected"), [(0, False), (1, True), (2, True)])
def test_only_those_of_the_same_priority_or_lower_wait_for_the_turn(priority, expected):
    admission = Admission(96, 96)
    waited(admission, "a", PATIENCE)
    admission.begin_step([Turn("a", 96, 1)])
    assert admission.is_before_turn("b", priority) is expected
    assert not admission.is_before_turn("a", 1)
    admission.started("a")
    assert not admission.is_before_turn("b", priority)
