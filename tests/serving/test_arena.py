import random
from itertools import pairwise

from vllm_pedro.serving.arena import Span, Spans
from vllm_pedro.serving.blobs import ALIGNMENT

A = ALIGNMENT


def test_spans_are_as_low_as_they_fit():
    spans = Spans(10 * A + 5)
    assert spans.capacity == 10 * A
    assert [spans.allocate(n, size * A) for n, size in (("a", 2), ("b", 3), ("c", 2))] == [
        Span(0, 2 * A), Span(2 * A, 5 * A), Span(5 * A, 7 * A)
    ]  # fmt: skip
    assert spans.allocate("d", 4 * A) is None
    assert spans.free("b") == Span(2 * A, 5 * A)
    assert spans.allocate("e", A) == Span(2 * A, 3 * A)
    assert spans.allocate("f", 3 * A) == Span(7 * A, 10 * A)
    assert spans.used == 8 * A
    assert spans.compact() == [
        (Span(5 * A, 7 * A), Span(3 * A, 5 * A)),
        (Span(7 * A, 10 * A), Span(5 * A, 8 * A)),
    ]
    assert spans["f"] == Span(5 * A, 8 * A)
    assert spans.compact() == []
    assert spans.allocate("g", 2 * A) == Span(8 * A, 10 * A)


def test_any_sequence_of_sizes_keeps_spans_apart_and_their_bytes():
    """Bytes are moved as they are told, and nothing that fits is refused after that."""
    draw = random.Random(1)
    for _ in range(40):
        spans = Spans(draw.randint(8, 64) * A)
        memory = bytearray(spans.capacity)
        held: dict[str, tuple[Span, bytes]] = {}
        for step in range(150):
            if held and draw.random() < 0.45:
                name = draw.choice(list(held))
                assert spans.free(name) == held.pop(name)[0]
            size = draw.choice([1, 1, 2, 3, 5, 8]) * A
            fits = sum(s.end - s.begin for s, _ in held.values()) + size <= spans.capacity
            span = spans.allocate(f"{step}", size)
            if span is None and fits:
                for old, new in spans.compact():
                    assert new.begin < old.begin
                    for at in range(0, old.end - old.begin, A):  # a move in pieces, ascending
                        piece = memory[old.begin + at : old.begin + at + A]
                        memory[new.begin + at : new.begin + at + A] = piece
                held = {name: (spans[name], content) for name, (_, content) in held.items()}
                span = spans.allocate(f"{step}", size)
            assert (span is not None) == fits
            if span is not None:
                content = draw.randbytes(size)
                memory[span.begin : span.end] = content
                held[f"{step}"] = (span, content)
            placed = sorted(span for span, _ in held.values())
            assert all(0 <= s.begin < s.end <= spans.capacity for s in placed)
            assert all(one.end <= two.begin for one, two in pairwise(placed))
            assert spans.used == sum(s.end - s.begin for s in placed)
            for span, content in held.values():
                assert span.begin % A == 0
                assert memory[span.begin : span.end] == content
