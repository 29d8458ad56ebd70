"""Routed experts of transformers' with Up scaled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .scaling import Factor, scale_sequences


class ScaledExperts:
    """Has a module compute its experts with Up scaled, as long as there are factors.

    Hooks see what all experts together read and put out; Up is in between.

    Args:
        module: transformers' module, whose weights are `gate_up_proj [E, 2 * I, d]` and `down_proj
            [E, d, I]`.
        factor: what says the factor of a call's tokens; None where nothing is scaled.
    """

    def __init__(self, module: nn.Module, factor: Callable[[Tensor], Factor | None]) -> None:
        self._module = module
        self._factor = factor
        self._had = module.__dict__.get("forward")
        self._original = module.forward
        module.forward = self._forward  # bound, so that a copy of the model has its own

    def _forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Any:
        found = self._factor(hidden_states)
        if found is None:
            return self._original(hidden_states, top_k_index, top_k_weights)
        factor, sequences = found
        assert sequences is not None
        return scaled_experts(
            self._module, hidden_states, top_k_index, top_k_weights, factor, sequences
        )

    def remove(self) -> None:
        """Have it compute them as before."""
        if self._had is None:
            del self._module.__dict__["forward"]
        else:
            self._module.forward = self._had


def scaled_experts(
    module: Any,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    factor: Tensor,
    sequences: Tensor,
) -> Tensor:
    """What a mixture's experts put out, Up of each token scaled by its sequence's factor.

    Args:
        module: transformers', see `ScaledExperts`.
        hidden: `[tokens, d]`.
        top_k_index: `[tokens, k]`, the experts that each token is routed to.
        top_k_weights: `[tokens, k]`, theirs.
        factor: `[N, I]`.
        sequences: `[tokens]`.

    Returns:
        `[tokens, d]`.
    """
    total = torch.zeros_like(hidden)
    for expert in top_k_index.unique().tolist():
        if expert == module.num_experts:  # of another rank
            continue
        tokens, choice = (top_k_index == expert).nonzero(as_tuple=True)
        gate, up = linear(hidden[tokens], module.gate_up_proj[expert]).chunk(2, dim=-1)
        up = scale_sequences(up, factor, sequences[tokens])
        product = linear(module.act_fn(gate) * up, module.down_proj[expert])
        product = product * top_k_weights[tokens, choice, None]
        total = total.index_add(0, tokens, product.to(total.dtype))
    return total
