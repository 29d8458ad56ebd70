import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pedro.serving.rows import Assignment, VectorRows

A, B, C = ("a", "x"), ("b", "x"), ("a", "y")


def generate(rows, request_id, key):
    """A request enters, and the step that generates its vectors is answered."""
    got = rows.acquire(request_id, key, "folder")
    rows.confirm(got)
    return got


def test_same_adapter_and_prompt_share_a_row():
    rows = VectorRows(2)
    first = rows.acquire("r1", A, "folder")
    assert first.must_generate
    assert rows.acquire("r2", A, "folder") == Assignment(first.row, False, first.generation)
    assert rows.acquire("r3", C, "folder").row != first.row
    with pytest.raises(RuntimeError, match="no free row in the vector store: more than 2"):
        rows.acquire("r4", B, "folder")


def test_vectors_are_cached_until_the_row_is_needed():
    rows = VectorRows(2)
    first = generate(rows, "r1", A)
    rows.free("r1")
    assert rows.num_read == 0
    assert rows.acquire("r2", A, "folder") == Assignment(first.row, False, first.generation)
    rows.free("r2")
    generate(rows, "r3", B)
    rows.free("r3")
    generate(rows, "r4", A)
    rows.free("r4")
    rows.acquire("r5", C, "folder")  # B is the least recently used
    assert rows.has(A)
    assert not rows.has(B)


def test_rows_that_are_read_are_never_taken():
    rows = VectorRows(2)
    held = generate(rows, "r1", A).row
    generate(rows, "r2", B)
    rows.free("r2")
    assert rows.acquire("r3", C, "folder").row != held
    assert rows.is_read_by("r1")


def test_the_folder_is_known_until_the_vectors_are():
    rows = VectorRows(2)
    assert rows.folder_of(A) is None
    made = rows.acquire("r1", A, "folder")
    rows.acquire("r2", A, "other")
    assert rows.folder_of(A) == "folder"
    rows.confirm(made)
    assert rows.folder_of(A) is None
    assert rows.has(A)


def test_vectors_that_nobody_confirmed_are_not_cached():
    rows = VectorRows(2)
    made = rows.acquire("r1", A, "folder")
    assert not rows.is_generated_for("r1")
    rows.free("r1")
    assert not rows.has(A)
    rows.confirm(made)  # the answer comes after the abort
    assert not rows.has(A)
    assert rows.acquire("r2", A, "folder").must_generate


def test_a_late_answer_does_not_speak_for_the_rows_next_owner():
    rows = VectorRows(1)
    made = rows.acquire("r1", A, "folder")
    rows.free("r1")
    rows.acquire("r2", B, "folder")
    rows.confirm(made)
    assert not rows.is_generated_for("r2")
    assert rows.fail(made) == set()
    assert rows.has(B)


def test_a_late_answer_does_not_speak_for_a_later_generation_of_the_same_vectors():
    rows = VectorRows(1)
    made = rows.acquire("r1", A, "folder")
    rows.free("r1")
    again = rows.acquire("r2", A, "folder")
    assert again.must_generate
    assert again.row == made.row
    rows.confirm(made)
    assert not rows.is_generated_for("r2")


def test_failed_vectors_fail_for_all_who_read_them():
    rows = VectorRows(3)
    bad = rows.acquire("r1", A, "folder")
    rows.acquire("r2", A, "folder")
    assert rows.fail(bad) == {"r1", "r2"}
    again = rows.acquire("r3", A, "folder")
    assert again.must_generate
    assert again.row != bad.row
    rows.free("r1")
    rows.free("r2")
    assert rows.has(A)


def test_new_weights_make_all_vectors_stale():
    rows = VectorRows(3)
    generate(rows, "r1", A)
    rows.invalidate_all()
    assert not rows.has(A)
    assert rows.acquire("r2", A, "folder").must_generate


def test_freeing_is_harmless_twice():
    rows = VectorRows(1)
    generate(rows, "r1", A)
    rows.free("r1")
    rows.free("r1")
    rows.free("unknown")
    assert rows.num_read == 0
    assert rows.has(A)


@given(st.lists(st.tuples(st.sampled_from("+-!?0"), st.integers(0, 5), st.integers(0, 3))))
def test_no_two_keys_ever_share_a_row_and_none_is_lost(steps):
    capacity, rows = 4, VectorRows(4)
    held, asked = {}, {}
    for action, request, key in steps:
        name = f"r{request}"
        if action == "+" and name not in held and len(held) < capacity:
            before = rows.has((str(key), ""))
            got = rows.acquire(name, (str(key), ""), "folder")
            assert got.must_generate is not before
            held[name] = (got.row, key)
            asked[name] = got
        elif action == "-":
            rows.free(name)
            held.pop(name, None)
        elif action == "!":
            if name in asked:
                for reader in rows.fail(asked[name]):
                    rows.free(reader)
                    held.pop(reader, None)
        elif action == "?" and name in asked:
            rows.confirm(asked[name])
        elif action == "0":
            rows.invalidate_all()
        keys = {}
        for row, k in held.values():
            assert 1 <= row <= capacity
            assert keys.setdefault(row, k) == k
        assert rows.num_read == len(keys)
