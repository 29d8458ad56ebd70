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
        store_rows: `[B]` int64, the row of the vector store that each request reads.
        lengths: `[B]` int64, its tokens in this step.
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
        prompt_length: P.
    """

    digest: str
    prompt_length: int


def plan_step(
    request_ids: Sequence[str],
    store_rows: Ints,
    lengths: Ints,
    computed: Ints,
    pending: Mapping[str, Pending],
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

    Returns:
        The plan, with a prefill for each pending request of the batch: its pooled token is computed
        in this step (`computed <= P - 1 < computed + length`).

    Raises:
        RuntimeError: A request would go on without its vectors. The scheduler keeps prompts whole
            and cuts cache hits at P - 1, so this is a defect, and going on would be silently wrong.
    """
    plan = StepPlan(np.array(store_rows, np.int64), np.asarray(lengths, np.int64))
    if not pending:
        return plan
    start = 0
    for index, request_id in enumerate(request_ids):
        count = int(lengths[index])
        request = pending.get(request_id)
        if request is not None:
            before = int(computed[index])
            length = request.prompt_length - before
            if length < 1:
                raise RuntimeError(
                    f"request {request_id!r} goes on at token {before} without vectors: its "
                    f"pooled token {request.prompt_length - 1} was never computed"
                )
            if count < length:
                raise RuntimeError(
                    f"the prompt of request {request_id!r} was split: {count} tokens after "
                    f"{before}, but its first {request.prompt_length} belong in one step"
                )
            plan.prefills.append(
                Prefill(request_id, start, length, int(store_rows[index]), request.digest)
            )
        start += count
    return plan
