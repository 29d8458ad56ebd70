"""Multiply projections by the adjustment vectors: ``Q' = l_q * Q`` for every token."""

from __future__ import annotations

from torch import Tensor

from ..serving.plan import StepPlan


def scaled(x: Tensor, vectors: Tensor, token_slots: Tensor, columns: slice) -> Tensor:
    """Gather and multiply, written so that Inductor fuses it into what comes after.

    Args:
        x: ``[tokens, width]``, a packed projection.
        vectors: ``[slots, D]``, one layer's vector store, in the dtype of ``x``.
        token_slots: ``[>= tokens]`` int64, the row of ``vectors`` that each token reads.
        columns: The columns of ``vectors`` that belong to ``x``.

    Returns:
        A new ``[tokens, width]``. Rows that read the identity row are bit-equal to ``x``.
    """
    return x * vectors[:, columns][token_slots[: x.shape[0]]]


def scale_(
    x: Tensor,
    vectors: Tensor,
    token_slots: Tensor,
    columns: slice,
    plan: StepPlan,
    offset: int = 0,
) -> None:
    """The same in place, for eager mode: rows without an adapter are neither read nor written.

    Args:
        x: ``[tokens, width]``, a packed projection; modified.
        vectors: ``[slots, D]``, one layer's vector store, in the dtype of ``x``.
        token_slots: ``[>= tokens]`` int64, the row of ``vectors`` that each token reads.
        columns: The columns of ``vectors`` to apply.
        plan: The step's plan; nothing happens if no row has an adapter.
        offset: First column of ``x`` that ``columns`` stands for.
    """
    segments = plan.segments
    if not segments:
        return
    end = offset + columns.stop - columns.start
    if 2 * len(segments) < plan.num_tokens:
        # Prompts: a row of vectors serves a long run of tokens, so broadcasting it beats a gather.
        for s in segments:
            x[s.start : s.start + s.length, offset:end].mul_(vectors[s.slot, columns])
        return
    slots = token_slots[: plan.num_tokens]
    x[: plan.num_tokens, offset:end].mul_(vectors[:, columns].index_select(0, slots))
