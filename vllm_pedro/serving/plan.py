"""The plan of one engine step: which vectors each token takes, and which prompts make vectors.

Everything here is plain Python on integers, shared by both model runners and tested without either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

IDENTITY_SLOT = 0
"""Row of the vector store that is all ones: rows without an adapter, padding and dummy rows."""


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """One request's share of a step.

    Attributes:
        request_id: The engine's id of the request.
        start: Index of its first token in the flattened batch.
        num_tokens: How many of its tokens this step computes; at least 1.
        num_computed: How many of its tokens were computed before, or came from the prefix cache.
    """

    request_id: str
    start: int
    num_tokens: int
    num_computed: int


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that take the same vectors: ``[start, start + length)`` reads ``slot``."""

    start: int
    length: int
    slot: int


@dataclass(frozen=True, slots=True)
class Prefill:
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
    """What one step does. Segments cover just the rows that have an adapter."""

    segments: list[Segment] = field(default_factory=list)
    prefills: list[Prefill] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(slots=True)
class Reader:
    """What the plan needs to know of a request with an adapter.

    Attributes:
        digest: Content digest of its adapter.
        prompt_length: P.
        slot: Its row of the vector store.
        has_vectors: Whether the row has its vectors, kept from before or made in an earlier step.
    """

    digest: str
    prompt_length: int
    slot: int
    has_vectors: bool


def plan_step(rows: Iterable[ScheduledRow], reader_of: Callable[[str], Reader | None]) -> StepPlan:
    """Plan one step.

    Args:
        rows: The batch in order.
        reader_of: Maps a request id to what is known of it, or None for a request without an
            adapter. A prompt that is prefilled is marked as having vectors.

    Returns:
        The plan: a segment for each row with an adapter, a prefill for each row without vectors,
        whose pooled token is computed in this step (``computed <= P - 1 < computed + n``).

    Raises:
        RuntimeError: A row would be computed without its vectors. The scheduler keeps prompts whole
            and cuts cache hits at P - 1, so this is a defect, and going on would be silently wrong.
    """
    plan = StepPlan()
    for row in rows:
        plan.num_tokens = max(plan.num_tokens, row.start + row.num_tokens)
        reader = reader_of(row.request_id)
        if reader is None:
            continue
        if not reader.has_vectors:
            length = reader.prompt_length - row.num_computed
            if length < 1:
                raise RuntimeError(
                    f"request {row.request_id!r} goes on at token {row.num_computed} without "
                    f"vectors: its pooled token {reader.prompt_length - 1} was never computed"
                )
            if row.num_tokens < length:
                raise RuntimeError(
                    f"the prompt of request {row.request_id!r} was split: {row.num_tokens} tokens "
                    f"after {row.num_computed}, but its first {reader.prompt_length} belong in one "
                    "step"
                )
            plan.prefills.append(
                Prefill(row.request_id, row.start, length, reader.slot, reader.digest)
            )
            reader.has_vectors = True
        plan.segments.append(Segment(row.start, row.num_tokens, reader.slot))
    return plan
