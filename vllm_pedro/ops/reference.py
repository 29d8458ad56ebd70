"""What the operators mean, in plain torch. Native and Triton versions are tested against this.

It also runs where there is neither: on a CPU without a compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..generator import generate_vectors as generate
from ..generator import pool_prompt
from .layout import ACTIVATIONS, POOLINGS, GeneratorLayout


@torch.no_grad()
def generate_vectors(
    hidden: Tensor, vectors: Tensor, generators: Tensor, prompts: Tensor, step: Tensor
) -> None:
    """See :func:`vllm_pedro.ops.generate_vectors`."""
    count = int(step[0])
    if count == 0:
        return
    views = GeneratorLayout.of(generators, hidden.shape[1], vectors.shape[1]).views(generators)
    # Rows of one adapter lie side by side.
    for slot, group in groupby(prompts[:count].tolist(), key=lambda prompt: prompt[3]):
        rows = list(group)
        kind, rank, m, n, pooling, norm = (int(x) for x in views.header[slot, :6].tolist())
        states = [
            pool_prompt(hidden[s : s + p], POOLINGS[pooling], "rms" if norm else None)
            for s, p, _, _ in rows
        ]
        made = generate(
            torch.stack(states),
            views.down[slot, :rank] if rank else None,
            views.up[slot, :, :rank] if rank else None,
            views.bias[slot],
            ACTIVATIONS[kind],
            views.numerator[slot, : m + 1],
            views.denominator[slot, :n],
        )
        vectors[[row for _, _, row, _ in rows]] = made.to(vectors.dtype)


def scale_qkv_(
    qkv: Tensor, vectors: Tensor, token_slots: Tensor, ranges: Sequence[int], step: Tensor
) -> None:
    """See :func:`vllm_pedro.ops.scale_qkv_`."""
    if int(step[1]) == 0:
        return
    slots = token_slots[: len(qkv)]
    for column, vector_column, width in zip(ranges[::3], ranges[1::3], ranges[2::3], strict=True):
        by = vectors[:, vector_column : vector_column + width].index_select(0, slots)
        qkv[:, column : column + width].mul_(by)
