"""The plan of an engine step: which row each token reads, and which prompts generate vectors.

Everything here is plain Python on integers, shared by both model runners and tested without either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IDENTITY_ROW = 0
"""Row of the vector store that is all ones: rows without an adapter, padding and dummy rows."""

Ints = Sequence[int] | npt.NDArray[np.integer]


class Prefill(NamedTuple):
    """A prompt whose vectors are generated in this step.

    Attributes:
        request_id: The engine's id of the request.
        start: Index in the flattened batch of the first prompt token computed in this step.
        length: Number of prompt tokens computed in this step; the last is the pooled one, P - 1.
            Equal to P unless a valid prefix came from the cache.
        row: Row of the vector store that receives the vectors.
        digest: Content digest of the adapter.
    """

    request_id: str
    start: int
    length: int
    row: int
    digest: str


@dataclass(slots=True)
class StepPlan:
    """What one step does, for a batch of `B` requests.

    Attributes:
        store_rows: `[B]` int64, the row of the vector store that each request reads; more entries
            where a request has tokens of both kinds, scaled and not.
        lengths: `[B]` int64, the tokens in this step that read it.
        prefills: The prompts that generate vectors.
    """

    store_rows: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    prefills: list[Prefill] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return int(self.lengths.sum())

    @property
    def num_with_adapter(self) -> int:
        """Requests that read another row than the identity."""
        return int(np.count_nonzero(self.store_rows))


@dataclass(slots=True)
class Pending:
    """A request that has a row whose vectors its prompt still has to generate.

    Attributes:
        digest: Content digest of its adapter.
        pooled_end: P; 0 if the vectors are static.
        is_answer: The adapter scales from token P - 1 on, and pools that one alone.
    """

    digest: str
    pooled_end: int
    is_answer: bool = False


def plan_step(
    request_ids: Sequence[str],
    store_rows: Ints,
    lengths: Ints,
    computed: Ints,
    pending: Mapping[str, Pending],
    first_scaled: Ints | None = None,
) -> StepPlan:
    """Plan one step.

    Decode steps cost a few array operations, whatever the size of the batch: nothing here looks at
    single requests unless some request is pending.

    Args:
        request_ids: The batch in order, `B` requests.
        store_rows: `[B]`, the row of the vector store that each reads.
        lengths: `[B]`, how many of its tokens this step computes; at least 1.
        computed: `[B]`, how many of its tokens were computed before, or came from the prefix
            cache. Read only for pending requests.
        pending: Requests whose vectors are not generated yet.
        first_scaled: `[B]`, the first token of each that is scaled; None where that is the first.

    Returns:
        The plan, with a prefill for each pending request of the batch: its pooled token is computed
        in this step (`computed <= P - 1 < computed + length`), or its vectors are static and no
        state of it is read.

    Raises:
        RuntimeError: A request would go on without its vectors. The scheduler keeps prompts whole
            and cuts cache hits at P - 1, so this is a defect, and going on would be silently wrong.
    """
    plan = StepPlan(np.array(store_rows, np.int64), np.asarray(lengths, np.int64))
    if first_scaled is not None:
        before = np.clip(np.asarray(first_scaled) - np.asarray(computed), 0, plan.lengths)
        if before.any():
            # Two entries a request: its tokens that are not scaled, and its others.
            rows = np.zeros(2 * len(before), np.int64)
            rows[1::2] = plan.store_rows
            counts = np.stack([before, plan.lengths - before], axis=1).reshape(-1)
            plan.store_rows, plan.lengths = rows[counts > 0], counts[counts > 0]
    if not pending:
        return plan
    start = 0
    for index, request_id in enumerate(request_ids):
        count = int(lengths[index])
        request = pending.get(request_id)
        if request is not None:
            before = int(computed[index])
            length = request.pooled_end - before if request.pooled_end else 1
            if length < 1:
                raise RuntimeError(
                    f"request {request_id!r} goes on at token {before} without vectors: its "
                    f"pooled token {request.pooled_end - 1} was never computed"
                )
            if count < length:
                raise RuntimeError(
                    f"the prompt of request {request_id!r} was split: {count} tokens after "
                    f"{before}, but its first {request.pooled_end} belong in one step"
                )
            skipped = length - 1 if request.is_answer else 0
            plan.prefills.append(
                Prefill(
                    request_id,
                    start + skipped,
                    length - skipped,
                    int(store_rows[index]),
                    request.digest,
                )
            )
        start += count
    return plan
