"""Which request reads which row of the vector store: the scheduler's side of it.

Rows are owned as KV blocks are: shared by content, cached after use, evicted when room is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

VectorKey = tuple[str, str]
"""What a row's vectors depend on, and nothing else: (adapter digest, digest of the prompt)."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Sent to the workers when a request enters, or comes back after preemption.

    Attributes:
        row: Row of the vector store; at least 1, as row 0 is the identity.
        must_generate: Whether this request's prompt generates the vectors; otherwise the row holds
            them already, or another request of the same step generates them.
        generation: Counts how often vectors were generated. A worker's late reply about an earlier
            content of the row is told by it, and ignored.
    """

    row: int
    must_generate: bool
    generation: int


@dataclass(slots=True)
class _Entry:
    key: VectorKey
    folder: str
    generation: int
    readers: set[str] = field(default_factory=set)
    is_generated: bool = False


class VectorRows:
    """Rows of the vector store by what they hold.

    Requests with the same adapter content and the same prompt share a row: parallel samples, beams,
    repeated prompts, later turns. A row without readers stays cached until another prompt needs it,
    least recently used first, so that a prompt whose KV blocks are still cached need not be
    computed again for its vectors. Vectors are cached only once the workers have answered the step
    that generates them: until then the adapter may still fail to load.

    Args:
        capacity: Rows beside row 0, the identity, which is never handed out.
    """

    def __init__(self, capacity: int) -> None:
        self._free = list(range(capacity, 0, -1))
        self._entries: dict[int, _Entry] = {}
        self._row_of_key: dict[VectorKey, int] = {}
        self._row_of_request: dict[str, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._generations = 0

    @property
    def num_read(self) -> int:
        """Rows that a running request reads."""
        return len(self._entries) - len(self._cached)

    def has(self, key: VectorKey) -> bool:
        """Whether some row holds these vectors."""
        return key in self._row_of_key

    def folder_of(self, key: VectorKey) -> str | None:
        """The folder of the adapter with which these vectors are being generated; None once they
        are, and where they are not."""
        row = self._row_of_key.get(key)
        if row is None or self._entries[row].is_generated:
            return None
        return self._entries[row].folder

    def is_read_by(self, request_id: str) -> bool:
        """Whether the request has a row."""
        return request_id in self._row_of_request

    def is_generated_for(self, request_id: str) -> bool:
        """Whether the request has a row, and the workers have generated its vectors."""
        row = self._row_of_request.get(request_id)
        return row is not None and self._entries[row].is_generated

    def acquire(self, request_id: str, key: VectorKey, folder: str) -> Assignment:
        """Give a request its row: the one that holds its vectors, or else one to generate them in.

        Args:
            request_id: The request.
            key: Its vectors'.
            folder: Its adapter's.

        Raises:
            RuntimeError: More requests run than there are rows.
        """
        row = self._row_of_key.get(key)
        must_generate = row is None
        if row is None:
            row = self._allocate()
            self._generations += 1
            self._entries[row] = _Entry(key, folder, self._generations)
            self._row_of_key[key] = row
        self._cached.pop(row, None)
        self._entries[row].readers.add(request_id)
        self._row_of_request[request_id] = row
        return Assignment(row, must_generate, self._entries[row].generation)

    def confirm(self, assignment: Assignment) -> set[str]:
        """The workers have generated these vectors; returns the requests that read the row."""
        entry = self._entry_of(assignment)
        if entry is None:
            return set()
        entry.is_generated = True
        return set(entry.readers)

    def fail(self, assignment: Assignment) -> set[str]:
        """The workers could not generate these vectors; returns the requests that read the row."""
        entry = self._entry_of(assignment)
        if entry is None:
            return set()
        self._drop_key(assignment.row)
        return set(entry.readers)

    def free(self, request_id: str) -> None:
        """The request ended or was preempted; a request without a row is ignored."""
        row = self._row_of_request.pop(request_id, None)
        if row is None:
            return
        entry = self._entries[row]
        entry.readers.discard(request_id)
        if not entry.readers:
            self._cached[row] = None
            if not entry.is_generated:
                self._drop_key(row)

    def invalidate_all(self) -> None:
        """The backbone's weights changed: no new request may read what the rows hold."""
        self._row_of_key.clear()

    def _allocate(self) -> int:
        """A free row, or the least recently used cached one, evicted."""
        if self._free:
            return self._free.pop()
        if not self._cached:
            raise RuntimeError(
                f"no free row in the vector store: more than {len(self._entries)} requests with an "
                "adapter are running"
            )
        row, _ = self._cached.popitem(last=False)
        self._drop_key(row)
        del self._entries[row]
        return row

    def _entry_of(self, assignment: Assignment) -> _Entry | None:
        """The row's entry, unless other vectors were generated there since."""
        entry = self._entries.get(assignment.row)
        return entry if entry is not None and entry.generation == assignment.generation else None

    def _drop_key(self, row: int) -> None:
        key = self._entries[row].key
        if self._row_of_key.get(key) == row:
            del self._row_of_key[key]
