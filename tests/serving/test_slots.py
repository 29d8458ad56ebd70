import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pedro.serving.slots import Assignment, VectorSlots

A, B, C = ("a", "x"), ("b", "x"), ("a", "y")


def make(slots, request_id, key):
    """A request enters, and the step that makes its vectors is answered."""
    got = slots.acquire(request_id, key)
    slots.confirm(got)
    return got


def test_same_adapter_and_prompt_share_a_row():
    slots = VectorSlots(2)
    first = slots.acquire("r1", A)
    assert first.makes
    assert slots.acquire("r2", A) == Assignment(first.slot, False, first.making)
    assert slots.acquire("r3", C).slot != first.slot
    with pytest.raises(RuntimeError, match="no free row in the vector store: more than 2"):
        slots.acquire("r4", B)


def test_vectors_are_kept_until_the_row_is_needed():
    slots = VectorSlots(2)
    first = make(slots, "r1", A)
    slots.release("r1")
    assert (slots.num_held, slots.num_kept) == (0, 1)
    assert slots.acquire("r2", A) == Assignment(first.slot, False, first.making)
    slots.release("r2")
    make(slots, "r3", B)
    slots.release("r3")
    make(slots, "r4", A)
    slots.release("r4")
    slots.acquire("r5", C)  # B is the least recently used
    assert slots.has(A)
    assert not slots.has(B)


def test_rows_that_are_read_are_never_taken():
    slots = VectorSlots(2)
    held = make(slots, "r1", A).slot
    make(slots, "r2", B)
    slots.release("r2")
    assert slots.acquire("r3", C).slot != held
    assert slots.is_held_by("r1")


def test_vectors_that_nobody_confirmed_are_not_kept():
    slots = VectorSlots(2)
    made = slots.acquire("r1", A)
    assert not slots.is_made_for("r1")
    slots.release("r1")
    assert not slots.has(A)
    slots.confirm(made)  # the answer comes after the abort
    assert not slots.has(A)
    assert slots.acquire("r2", A).makes


def test_a_late_answer_does_not_speak_for_the_rows_next_owner():
    slots = VectorSlots(1)
    made = slots.acquire("r1", A)
    slots.release("r1")
    slots.acquire("r2", B)
    slots.confirm(made)
    assert not slots.is_made_for("r2")
    assert slots.withdraw(made) == set()
    assert slots.has(B)


def test_a_late_answer_does_not_speak_for_a_later_making_of_the_same_vectors():
    slots = VectorSlots(1)
    made = slots.acquire("r1", A)
    slots.release("r1")
    again = slots.acquire("r2", A)
    assert again.makes
    assert again.slot == made.slot
    slots.confirm(made)
    assert not slots.is_made_for("r2")


def test_failed_vectors_are_withdrawn_with_all_who_read_them():
    slots = VectorSlots(3)
    bad = slots.acquire("r1", A)
    slots.acquire("r2", A)
    assert slots.withdraw(bad) == {"r1", "r2"}
    again = slots.acquire("r3", A)
    assert again.makes
    assert again.slot != bad.slot
    slots.release("r1")
    slots.release("r2")
    assert slots.has(A)


def test_new_weights_make_all_vectors_stale():
    slots = VectorSlots(3)
    make(slots, "r1", A)
    slots.forget_all()
    assert not slots.has(A)
    assert slots.acquire("r2", A).makes


def test_release_is_harmless_twice():
    slots = VectorSlots(1)
    make(slots, "r1", A)
    slots.release("r1")
    slots.release("r1")
    slots.release("unknown")
    assert slots.num_kept == 1


@given(st.lists(st.tuples(st.sampled_from("+-!?0"), st.integers(0, 5), st.integers(0, 3))))
def test_no_two_keys_ever_share_a_row_and_none_is_lost(steps):
    capacity, slots = 4, VectorSlots(4)
    held, asked = {}, {}
    for action, request, key in steps:
        name = f"r{request}"
        if action == "+" and name not in held and len(held) < capacity:
            before = slots.has((str(key), ""))
            got = slots.acquire(name, (str(key), ""))
            assert got.makes is not before
            held[name] = (got.slot, key)
            asked[name] = got
        elif action == "-":
            slots.release(name)
            held.pop(name, None)
        elif action == "!":
            if name in asked:
                for reader in slots.withdraw(asked[name]):
                    slots.release(reader)
                    held.pop(reader, None)
        elif action == "?" and name in asked:
            slots.confirm(asked[name])
        elif action == "0":
            slots.forget_all()
        rows = {}
        for slot, k in held.values():
            assert 1 <= slot <= capacity
            assert rows.setdefault(slot, k) == k
        assert slots.num_held == len(rows)
        assert slots.num_held + slots.num_kept <= capacity
