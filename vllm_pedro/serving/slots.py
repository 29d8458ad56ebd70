"""Who owns which row of the vector store: kept by the scheduler, like the owners of KV blocks."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

VectorKey = tuple[str, str]
"""What a row's vectors depend on, and nothing else: (adapter digest, digest of the prompt)."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Sent to the workers when a request enters, or comes back after preemption.

    Attributes:
        slot: Row of the vector store.
        makes: Whether this request's prompt makes the vectors; otherwise the row has them.
        making: Number of this making of vectors, so that a late answer speaks for no later one.
    """

    slot: int
    makes: bool
    making: int


@dataclass(slots=True)
class _Row:
    key: VectorKey
    making: int
    holders: set[str] = field(default_factory=set)
    is_made: bool = False


class VectorSlots:
    """Rows of the vector store by what they hold.

    Requests with the same adapter content and the same prompt share a row: parallel samples, beams,
    repeated prompts, later turns. A row that nobody holds any more keeps its vectors until another
    prompt needs it, least recently used first, so that a prompt whose KV blocks are still cached
    need not be computed again for its vectors. It keeps them only once the workers have answered
    the step that made them: until then nobody knows whether the adapter could be had. Row 0, the
    identity, is never handed out.
    """

    def __init__(self, capacity: int) -> None:
        self._free = list(range(capacity, 0, -1))
        self._rows: dict[int, _Row] = {}
        self._slot_of_key: dict[VectorKey, int] = {}
        self._slot_of_request: dict[str, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._makings = 0

    @property
    def num_held(self) -> int:
        """Rows that a running request reads."""
        return len(self._rows) - len(self._idle)

    @property
    def num_kept(self) -> int:
        """Rows that nobody reads but that still have their vectors."""
        return len(self._idle)

    def has(self, key: VectorKey) -> bool:
        """Whether some row holds these vectors."""
        return key in self._slot_of_key

    def is_held_by(self, request_id: str) -> bool:
        """Whether the request has a row."""
        return request_id in self._slot_of_request

    def is_made_for(self, request_id: str) -> bool:
        """Whether the request has a row whose vectors are known to be made."""
        slot = self._slot_of_request.get(request_id)
        return slot is not None and self._rows[slot].is_made

    def acquire(self, request_id: str, key: VectorKey) -> Assignment:
        """Give a request its row: the one with its vectors, or else one for it to make them in.

        Raises:
            RuntimeError: More requests run than there are rows.
        """
        slot = self._slot_of_key.get(key)
        makes = slot is None
        if slot is None:
            slot = self._take()
            self._makings += 1
            self._rows[slot] = _Row(key, self._makings)
            self._slot_of_key[key] = slot
        self._idle.pop(slot, None)
        self._rows[slot].holders.add(request_id)
        self._slot_of_request[request_id] = slot
        return Assignment(slot, makes, self._rows[slot].making)

    def confirm(self, made: Assignment) -> None:
        """The workers have made these vectors."""
        row = self._row_of(made)
        if row is not None:
            row.is_made = True

    def withdraw(self, failed: Assignment) -> set[str]:
        """These vectors could not be made; the requests that read the row all the same."""
        row = self._row_of(failed)
        if row is None:
            return set()
        self._drop_key(failed.slot)
        return set(row.holders)

    def release(self, request_id: str) -> None:
        """The request ended or was preempted; a request without a row is ignored."""
        slot = self._slot_of_request.pop(request_id, None)
        if slot is None:
            return
        row = self._rows[slot]
        row.holders.discard(request_id)
        if not row.holders:
            self._idle[slot] = None
            if not row.is_made:
                self._drop_key(slot)

    def forget_all(self) -> None:
        """The backbone's weights changed: no row's vectors may be used for a new request."""
        self._slot_of_key.clear()

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        if not self._idle:
            raise RuntimeError(
                f"no free row in the vector store: more than {len(self._rows)} requests with an "
                "adapter are running"
            )
        slot, _ = self._idle.popitem(last=False)
        self._drop_key(slot)
        del self._rows[slot]
        return slot

    def _row_of(self, assignment: Assignment) -> _Row | None:
        """The row, unless its vectors were made anew since."""
        row = self._rows.get(assignment.slot)
        return row if row is not None and row.making == assignment.making else None

    def _drop_key(self, slot: int) -> None:
        key = self._rows[slot].key
        if self._slot_of_key.get(key) == slot:
            del self._slot_of_key[key]
