"""Which bytes of an arena are whose."""

from __future__ import annotations

from typing import NamedTuple

from .blobs import ALIGNMENT


class Span(NamedTuple):
    """Bytes of an arena.

    Attributes:
        begin: The first.
        end: The one after the last.
    """

    begin: int
    end: int

    @property
    def size(self) -> int:
        """How many."""
        return self.end - self.begin


class Spans:
    """Contiguous spans by name: each as low as it fits, and moved down where no hole is left.

    Attributes:
        capacity: Bytes of the arena, a multiple of `ALIGNMENT`, as all sizes are.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // ALIGNMENT * ALIGNMENT
        self._spans: dict[str, Span] = {}  # by where they begin

    def __getitem__(self, name: str) -> Span:
        return self._spans[name]

    @property
    def used(self) -> int:
        """Bytes of all spans."""
        return sum(span.size for span in self._spans.values())

    def allocate(self, name: str, nbytes: int) -> Span | None:
        """A new span; None if no hole is large enough."""
        begin = 0
        for span in self._spans.values():
            if span.begin - begin >= nbytes:
                break
            begin = span.end
        if self.capacity - begin < nbytes:
            return None
        self._spans[name] = Span(begin, begin + nbytes)
        self._spans = dict(sorted(self._spans.items(), key=lambda item: item[1].begin))
        return self._spans[name]

    def free(self, name: str) -> Span:
        """Give a span back."""
        return self._spans.pop(name)

    def compact(self) -> list[tuple[Span, Span]]:
        """Leave no hole.

        Returns:
            Moves, from and to, to be made in this order: none overwrites what a later one reads.
        """
        moves, end = [], 0
        for name, span in self._spans.items():
            new = Span(end, end + span.end - span.begin)
            if new != span:
                moves.append((span, new))
            self._spans[name] = new
            end = new.end
        return moves
