"""Routed experts with a scaled Up, on the CPU: computed anew for tokens with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

PANEL: Final = 16
"""Outputs that lie side by side in an expert's weights as vLLM packs them for a CPU's vector units:
`[outputs / 16, inputs, 16]`."""

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
"""By vLLM's names."""


@torch.library.custom_op("vllm_pedro::scale_experts_", mutates_args=("output",), device_types="cpu")
def scale_experts_(
    output: Tensor,
    hidden: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    experts: Tensor,
    activation: str,
    vectors: Tensor,
    token_rows: Tensor,
    column: int,
    width: int,
    counts: Tensor,
) -> None:
    """Compute what routed experts put out for tokens with an adapter, Up scaled by its vector.

    Args:
        output: `[tokens, d]`; rows of tokens that read the identity row are left as they are.
        hidden: `[tokens, d]`, what the experts read.
        w13: `[E, 2 * I, d]`, gate above up, packed.
        w2: `[E, d, I]`, packed.
        weights: `[tokens, k]` float32, of the experts that each token is routed to.
        experts: `[tokens, k]` integers, their numbers.
        activation: One of `ACTIVATIONS`.
        vectors: `[rows, D]`, one layer's vector store, in the dtype of `hidden`.
        token_rows: `[>= tokens]` int64, the row of `vectors` that each token reads.
        column: The first of `vectors` that is the experts'.
        width: How many are, at most I: vLLM pads experts with columns of zeros.
        counts: `[3]` int32; nothing happens where `counts[1]` is 0.
    """
    if not counts[1]:
        return
    rows = token_rows[: len(hidden)]
    tokens = rows.nonzero().flatten()
    inner = w2.shape[2]
    shift = functional.pad(vectors[rows[tokens], column : column + width], (0, inner - width))
    factor = 1.0 + shift.float()
    hidden, weights, experts = hidden[tokens], weights[tokens], experts[tokens]
    total = torch.zeros(hidden.shape, dtype=torch.float32)
    for expert in experts.unique().tolist():
        at, choice = (experts == expert).nonzero(as_tuple=True)
        gate, up = _linear(hidden[at], w13[expert]).split(inner, dim=-1)
        scaled = (ACTIVATIONS[activation](gate) * up * factor[at]).to(hidden.dtype)
        product = _linear(scaled, w2[expert])
        total.index_add_(0, at, product.float() * weights[at, choice, None])
    output[tokens] = total.to(output.dtype)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """`[tokens, outputs]` of `[tokens, inputs]` and packed `[outputs, inputs]`."""
    outputs, inputs = weight.shape
    panels = torch.matmul(x, weight.view(outputs // PANEL, inputs, PANEL))
    return panels.transpose(0, 1).reshape(len(x), outputs)
