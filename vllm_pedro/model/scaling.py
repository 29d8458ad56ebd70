"""Scale a projection's output by each sequence's vector, and keep little for the backward pass."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

SMALLEST_FACTOR: Final = {torch.float64: 1e-150, torch.float32: 1e-20, torch.bfloat16: 1e-20}
"""What stands for a factor of zero where gradients are computed, by dtype."""

Factor = tuple[Tensor, Tensor | None]
"""The factors of N sequences, `[N, d]`, and each token's sequence; None where each row is one."""


def scale_sequences(output: Tensor, factor: Tensor, sequences: Tensor | None = None) -> Tensor:
    """`output * factor`, each token by its own sequence's factor.

    Multiplying as it stands would keep `output` until the backward pass, for the factor's gradient,
    beside the product, which what follows keeps anyway. Here the product alone is kept: the
    gradient of factor j is the sum over tokens of gradient x product / factor, and a float divided
    by a factor that it was multiplied by comes back within two roundings. A factor below
    `SMALLEST_FACTOR` (which no training reaches) stands for that value where gradients are
    computed, so that the division is always possible. In float16, whose products underflow far
    earlier, `output` is kept.

    Args:
        output: `[B, S, d]`, or `[tokens, d]`.
        factor: `[B, d]`, or `[N, d]` of N sequences; same dtype and device.
        sequences: `[B, S]` or `[tokens]`, the sequence of each token; None where each row is one.

    Returns:
        As `output`.
    """
    if torch.is_grad_enabled() and factor.requires_grad and output.dtype in SMALLEST_FACTOR:
        scaled: Tensor = _Scale.apply(output, factor, sequences)
        return scaled
    return output * _spread(factor, sequences)


def _spread(factor: Tensor, sequences: Tensor | None) -> Tensor:
    return factor[:, None, :] if sequences is None else factor[sequences]


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, factor: Tensor, sequences: Tensor | None) -> Tensor:
        smallest = SMALLEST_FACTOR[output.dtype]
        factor = torch.where(factor.abs() < smallest, smallest, factor)
        product = output * _spread(factor, sequences)
        ctx.save_for_backward(product, factor, sequences)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        product, factor, sequences = ctx.saved_tensors
        of_output = of_factor = None
        if ctx.needs_input_grad[0]:
            of_output = gradient * _spread(factor, sequences)
        if ctx.needs_input_grad[1]:
            each = gradient * product
            wide = torch.float64 if each.dtype == torch.float64 else torch.float32
            if sequences is None:
                total = each.sum(dim=1, dtype=wide)
            else:
                total = torch.zeros(factor.shape, dtype=wide, device=factor.device)
                total.index_add_(0, sequences.flatten(), each.flatten(0, -2).to(wide))
            of_factor = (total / factor).to(factor.dtype)
        return of_output, of_factor, None
