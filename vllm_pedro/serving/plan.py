"""The plan of one engine step: which vectors each token takes, and which prompts make vectors.

Everything here is plain Python on integers, shared by both model runners and tested without either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IDENTITY_SLOT = 0
"""Row of the vector store that is all ones: rows without an adapter, padding and dummy rows."""

Ints = Sequence[int] | npt.NDArray[np.integer]


class Segment(NamedTuple):
    """A run of tokens that take the same vectors: ``[start, start + length)`` reads ``slot``."""

    start: int
    length: int
    slot: int


class Prefill(NamedTuple):
    """A prompt whose vectors are made in this step.

    Attributes:
        request_id: The engine's id of the request.
        start: Index in the flattened batch of the first prompt token computed in this step.
        length: Number of prompt tokens computed in this step; the last is the pooled one, P - 1.
            Equal to P unless a valid prefix came from the cache.
        slot: Row of the vector store that receives the vectors.
        digest: Content digest of the adapter.
    """

    request_id: str
    start: int
    length: int
    slot: int
    digest: str


@dataclass(slots=True)
class StepPlan:
    """What one step does.

    Attributes:
        row_slots: ``[rows]`` int64, the row of the vector store that each row of the batch reads.
        lengths: ``[rows]`` int64, its tokens in this step.
        prefills: The prompts that make vectors.
    """

    row_slots: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    prefills: list[Prefill] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return int(self.lengths.sum())

    @property
    def num_rows_with_adapter(self) -> int:
        """Rows that read another row than the identity."""
        return int(np.count_nonzero(self.row_slots))

    @property
    def segments(self) -> list[Segment]:
        """The rows with an adapter, as runs of tokens."""
        starts = np.cumsum(self.lengths) - self.lengths
        return [
            Segment(int(starts[i]), int(self.lengths[i]), int(self.row_slots[i]))
            for i in np.flatnonzero(self.row_slots)
        ]


@dataclass(slots=True)
class Reader:
    """What the plan needs to know of a request that still has to make its vectors.

    Attributes:
        digest: Content digest of its adapter.
        prompt_length: P.
    """

    digest: str
    prompt_length: int


def plan_step(
    request_ids: Sequence[str],
    row_slots: Ints,
    lengths: Ints,
    computed: Ints,
    without_vectors: Mapping[str, Reader],
) -> StepPlan:
    """Plan one step.

    Decode steps cost a few array operations, whatever the number of rows: nothing here looks at
    single rows unless some request still has to make its vectors.

    Args:
        request_ids: The batch in order.
        row_slots: ``[rows]``, the row of the vector store that each reads.
        lengths: ``[rows]``, how many of its tokens this step computes; at least 1.
        computed: ``[rows]``, how many of its tokens were computed before, or came from the prefix
            cache. Read only for the requests in ``without_vectors``.
        without_vectors: The requests that have a row but not yet their vectors.

    Returns:
        The plan, with a prefill for each row without vectors, whose pooled token is computed in
        this step (``computed <= P - 1 < computed + n``).

    Raises:
        RuntimeError: A row would be computed without its vectors. The scheduler keeps prompts whole
            and cuts cache hits at P - 1, so this is a defect, and going on would be silently wrong.
    """
    plan = StepPlan(np.array(row_slots, np.int64), np.asarray(lengths, np.int64))
    if not without_vectors:
        return plan
    start = 0
    for index, request_id in enumerate(request_ids):
        count = int(lengths[index])
        reader = without_vectors.get(request_id)
        if reader is not None:
            before = int(computed[index])
            length = reader.prompt_length - before
            if length < 1:
                raise RuntimeError(
                    f"request {request_id!r} goes on at token {before} without vectors: its "
                    f"pooled token {reader.prompt_length - 1} was never computed"
                )
            if count < length:
                raise RuntimeError(
                    f"the prompt of request {request_id!r} was split: {count} tokens after "
                    f"{before}, but its first {reader.prompt_length} belong in one step"
                )
            plan.prefills.append(
                Prefill(request_id, start, length, int(row_slots[index]), reader.digest)
            )
        start += count
    return plan
