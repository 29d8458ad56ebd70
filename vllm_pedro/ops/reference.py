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
from .layout import read_record


@torch.no_grad()
def generate_vectors(
    hidden: Tensor,
    vectors: Tensor,
    arena: Tensor,
    prefills: Tensor,
    layer: Tensor,
    counts: Tensor,
) -> None:
    """See `vllm_pedro.ops.generate_vectors`."""
    count = int(counts[0])
    # Prompts of one adapter lie side by side.
    for place, group in groupby(prefills[:count].tolist(), key=lambda prompt: prompt[3]):
        prompts = list(group)
        rows = [row for _, _, row, _ in prompts]
        vectors[rows] = 0.0
        record = read_record(arena, place, int(layer))
        if record is None:
            continue
        states = [
            pool_prompt(hidden[start : start + length], record.pooling, record.input_norm)
            for start, length, _, _ in prompts
        ]
        has_input = len(record.down) > 0
        generated = generate(
            torch.stack(states),
            record.down if has_input else None,
            record.up.t() if has_input else None,
            record.bias.float() - 1.0,
            record.activation,
            record.numerator,
            record.denominator,
            record.down_bias,
        ).to(vectors.dtype)
        widths = [width for _, width in record.ranges]
        for (column, width), part in zip(record.ranges, generated.split(widths, 1), strict=True):
            vectors[rows, column : column + width] = part


def scale_columns_(
    x: Tensor, vectors: Tensor, token_rows: Tensor, ranges: Sequence[int], counts: Tensor
) -> None:
    """See `vllm_pedro.ops.scale_columns_`."""
    if int(counts[1]) == 0:
        return
    rows = token_rows[: len(x)]
    for column, vector_column, width in zip(ranges[::3], ranges[1::3], ranges[2::3], strict=True):
        by = vectors[:, vector_column : vector_column + width].index_select(0, rows)
        part = x[:, column : column + width]
        part.copy_(part.float() * (1.0 + by.float()))
