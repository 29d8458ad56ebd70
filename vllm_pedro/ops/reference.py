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
    hidden: Tensor, vectors: Tensor, generators: Tensor, prefills: Tensor, counts: Tensor
) -> None:
    """See `vllm_pedro.ops.generate_vectors`."""
    count = int(counts[0])
    if count == 0:
        return
    views = GeneratorLayout.of(generators, hidden.shape[1], vectors.shape[1]).views(generators)
    # Prompts of one adapter lie side by side.
    for slot, group in groupby(prefills[:count].tolist(), key=lambda prompt: prompt[3]):
        prompts = list(group)
        kind, rank, m, n, pooling, norm = (int(x) for x in views.header[slot, :6].tolist())
        states = [
            pool_prompt(hidden[start : start + length], POOLINGS[pooling], "rms" if norm else None)
            for start, length, _, _ in prompts
        ]
        generated = generate(
            torch.stack(states),
            views.down[slot, :rank] if rank else None,
            views.up[slot, :, :rank] if rank else None,
            views.bias[slot],
            ACTIVATIONS[kind],
            views.numerator[slot, : m + 1],
            views.denominator[slot, :n],
        )
        vectors[[row for _, _, row, _ in prompts]] = generated.to(vectors.dtype)


def scale_columns_(
    x: Tensor, vectors: Tensor, token_rows: Tensor, ranges: Sequence[int], counts: Tensor
) -> None:
    """See `vllm_pedro.ops.scale_columns_`."""
    if int(counts[1]) == 0:
        return
    rows = token_rows[: len(x)]
    for column, vector_column, width in zip(ranges[::3], ranges[1::3], ranges[2::3], strict=True):
        by = vectors[:, vector_column : vector_column + width].index_select(0, rows)
        x[:, column : column + width].mul_(by)
