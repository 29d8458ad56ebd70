"""The routed experts of a loaded model, and Up scaled within them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...architectures import EXPERTS_UP
from ...ops.experts import ACTIVATIONS, PANEL, scale_experts_
from ...serving.layer import PedroLayer


def kernel_of(experts: Any) -> Any:
    """What computes a layer's routed experts, on a CPU without AMX.

    Args:
        experts: vLLM's module.

    Raises:
        ValueError: It is computed in another way, which is not known to be exact.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    routed = experts.routed_experts
    kernel: Any = getattr(routed.quant_method.moe_kernel, "fused_experts", None)
    config = routed.moe_config
    reason = ""
    if type(kernel) is not CPUUnquantizedExperts or kernel._use_zentorch:
        reason = f"they are computed by {type(kernel).__name__}, where it has not been run"
    elif config.activation.value not in ACTIVATIONS:
        reason = f"their activation is {config.activation.value}"
    elif config.has_bias:
        reason = "they have biases"
    elif routed.expert_map is not None or config.moe_parallel_config.dp_size > 1:
        reason = "their tokens or weights are spread over ranks"
    elif not _is_packed_in_panels():
        reason = "their weights are packed in an order that is not known"
    if reason:
        raise ValueError(
            f"PEDRO cannot scale Up within the experts of this engine: {reason} (leave "
            f"{EXPERTS_UP} out of pedro_target_modules)"
        )
    return kernel


def _is_packed_in_panels() -> bool:
    from vllm._custom_ops import cpu_prepack_moe_weight

    probe = torch.arange(32.0 * 32).view(1, 32, 32)
    panels = probe.view(32 // PANEL, PANEL, 32).transpose(1, 2)
    return torch.equal(cpu_prepack_moe_weight(probe, "vec").flatten(), panels.flatten())


def scaling_apply(kernel: Any, state: PedroLayer, columns: slice) -> Callable[..., None]:
    """A kernel's `apply` with Up scaled for the step's tokens.

    Args:
        kernel: vLLM's.
        state: The layer.
        columns: The store's columns for Up within experts.
    """
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
