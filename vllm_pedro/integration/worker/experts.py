"""The routed experts of a loaded model, and Up scaled within them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...architectures import EXPERTS_UP
from ...ops.experts import ACTIVATIONS, PANEL, scale_experts_
from ...serving.layer import PedroLayer

Replacement = tuple[Any, str, Callable[..., None]]
"""An object of vLLM's, the name of a method of it, and what takes its place."""


def scaling(experts: Any, state: PedroLayer, columns: slice) -> Replacement:
    """How to have a layer's routed experts computed with Up scaled.

    Args:
        experts: vLLM's module.
        state: The layer.
        columns: The store's columns for Up within experts.

    Raises:
        ValueError: They are computed in a way that is not known to be exact.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    routed = experts.routed_experts
    kernel: Any = getattr(routed.quant_method.moe_kernel, "fused_experts", None)
    config = routed.moe_config
    # Subclasses quantise, or have tokens in another order.
    on_cpu, by_triton = (type(kernel) is cls for cls in (CPUUnquantizedExperts, TritonExperts))
    reason = ""
    if not (on_cpu or by_triton) or (on_cpu and kernel._use_zentorch):
        reason = f"they are computed by {type(kernel).__name__}, where it has not been run"
    elif config.activation.value not in ACTIVATIONS:
        reason = f"their activation is {config.activation.value}"
    elif config.has_bias:
        reason = "they have biases"
    elif by_triton and kernel.quant_config.quant_dtype is not None:
        reason = "they are quantised"
    elif routed.expert_map is not None or config.moe_parallel_config.dp_size > 1:
        reason = "their tokens or weights are spread over ranks"
    elif on_cpu and not _is_packed_in_panels():
        reason = "their weights are packed in an order that is not known"
    if reason:
        raise ValueError(
            f"PEDRO cannot scale Up within the experts of this engine: {reason} (leave "
            f"{EXPERTS_UP} out of pedro_target_modules)"
        )
    if on_cpu:
        return kernel, "apply", _scaling_apply(kernel, state, columns)
    choices = config.experts_per_token
    return kernel, "activation", _scaling_activation(kernel, state, columns, choices)


def _is_packed_in_panels() -> bool:
    from vllm._custom_ops import cpu_prepack_moe_weight

    probe = torch.arange(32.0 * 32).view(1, 32, 32)
    panels = probe.view(32 // PANEL, PANEL, 32).transpose(1, 2)
    return torch.equal(cpu_prepack_moe_weight(probe, "vec").flatten(), panels.flatten())


def _scaling_activation(
    kernel: Any, state: PedroLayer, columns: slice, choices: int
) -> Callable[..., None]:
    """What lies between the two products of vLLM's Triton experts, for each token `choices` rows
    side by side."""
    original = kernel.activation

    def activation(
        activation: Any, output: torch.Tensor, input: torch.Tensor, **others: Any
    ) -> None:
        original(activation, output, input, **others)
        rows = output.view(-1, choices, output.shape[-1])
        rows *= 1.0 + state.vectors[state.token_rows[: len(rows)], None, columns].float()

    return activation


def _scaling_apply(kernel: Any, state: PedroLayer, columns: slice) -> Callable[..., None]:
    """vLLM's CPU kernel goes from router weights to output in one call: tokens with an adapter are
    computed anew behind it."""
    original = kernel.apply

    def apply(
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: Any,
        **others: Any,
    ) -> None:
        original(
            output, hidden_states, w1, w2, topk_weights, topk_ids, activation=activation, **others
        )
        if others["apply_router_weight_on_input"]:
            topk_weights = torch.ones_like(topk_weights)
        scale_experts_(
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation.value,
            state.vectors,
            state.token_rows,
            columns.start,
            columns.stop - columns.start,
            state.counts,
        )

    return apply
