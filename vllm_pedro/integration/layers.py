"""Hooks on a vLLM model: make vectors at each layer's input, apply them to its projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TARGET_MODULES, BackboneShape
from ..ops import bind_layer, prefill_vectors, scale_, scaled
from ..serving.runtime import PedroRuntime

PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's packed projections and what they pack, in the order of their columns."""


class PedroLayer(nn.Module):
    """One decoder layer's tensors, as buffers so that the compiled graph takes them as inputs.

    Attributes:
        vectors: ``[slots, D]``, the layer's store.
        token_slots: ``[max_tokens]`` int64, shared by all layers.
        one: A scalar 1 in the model's dtype, which no compiler can fold away.
    """

    vectors: Tensor
    token_slots: Tensor
    one: Tensor

    def __init__(self, vectors: Tensor, token_slots: Tensor) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("token_slots", token_slots, persistent=False)
        self.register_buffer(
            "one", torch.ones((), dtype=vectors.dtype, device=vectors.device), persistent=False
        )


def find_decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a vLLM model.

    Raises:
        ValueError: There are none with the projections that PEDRO scales.
    """
    for name, module in model.named_modules():
        if not (isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "layers"):
            continue
        if len(module) and all(_is_decoder_layer(layer) for layer in module):
            return list(module)
    raise ValueError(
        f"{type(model).__name__} has no decoder layers with input_layernorm, self_attn.qkv_proj "
        "and mlp.gate_up_proj: PEDRO does not know its projections"
    )


def _is_decoder_layer(layer: nn.Module) -> bool:
    return (
        hasattr(layer, "input_layernorm")
        and hasattr(getattr(layer, "self_attn", None), "qkv_proj")
        and hasattr(getattr(layer, "mlp", None), "gate_up_proj")
    )


def layer_widths(layer: nn.Module) -> dict[str, int]:
    """Output width of each projection, as the loaded layer has it."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    gate, up = mlp.gate_up_proj.output_sizes
    return {
        "q_proj": attention.q_size,
        "k_proj": attention.kv_size,
        "v_proj": attention.kv_size,
        "gate_proj": gate,
        "up_proj": up,
    }


def install_hooks(model: nn.Module, shape: BackboneShape, runtime: PedroRuntime) -> None:
    """Hook every decoder layer of ``model`` up to the runtime.

    Forward hooks leave modules and parameter names as they are, so weights load and reload as ever.

    Raises:
        ValueError: The model is not of the shape that its configuration promised.
    """
    layers = find_decoder_layers(model)
    if len(layers) != shape.num_layers:
        raise ValueError(f"the model has {len(layers)} decoder layers, not {shape.num_layers}")
    expected = {module: shape.widths[module] for module in TARGET_MODULES}
    for index, layer in enumerate(layers):
        if layer_widths(layer) != expected:
            raise ValueError(
                f"layer {index} has projections of widths {layer_widths(layer)}, "
                f"expected {expected}"
            )
        _hook_layer(layer, index, runtime)


def _hook_layer(layer: Any, index: int, runtime: PedroRuntime) -> None:
    store = runtime.store
    state = PedroLayer(store.vectors[index], store.token_slots)
    layer.add_module("pedro", state)

    def write(hidden: Tensor) -> None:
        if runtime.makes_vectors:
            runtime.write_vectors(index, hidden)

    bind_layer(state.vectors, write)
    layer.input_layernorm.register_forward_hook(_input_hook(state, write))
    for name, packed in PACKED.items():
        columns = _columns(store.columns, packed)
        if columns is None:
            continue
        owner = layer.self_attn if name == "qkv_proj" else layer.mlp
        projection = getattr(owner, name)
        offset = 0
        for module in packed:
            if module in store.columns:
                break
            offset += layer_widths(layer)[module]
        total = sum(layer_widths(layer)[module] for module in packed)
        projection.register_forward_hook(_scale_hook(state, columns, offset, total, runtime))


def _columns(columns: dict[str, slice], packed: tuple[str, ...]) -> slice | None:
    """The store's columns from the first to the last module of a packed projection it holds."""
    held = [columns[module] for module in packed if module in columns]
    return slice(held[0].start, held[-1].stop) if held else None


def _input_hook(state: PedroLayer, write: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # vLLM's norms take (x, residual) and return (normed, residual + x), which is the layer's
        # input; in the first layer, and in models without the fused form, the argument itself is.
        hidden = output[1] if isinstance(output, tuple) else args[0]
        if torch.compiler.is_compiling():
            # A copy, not the residual itself: Inductor keeps that in float32 across fused kernels,
            # and an operator that reads it would force it into 16 bits there, for base rows too.
            prefill_vectors(hidden * state.one, state.vectors)
        else:
            write(hidden)

    return hook


def _scale_hook(
    state: PedroLayer, columns: slice, offset: int, total: int, runtime: PedroRuntime
) -> Callable[..., Any]:
    whole = offset == 0 and columns.stop - columns.start == total

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if torch.compiler.is_compiling():
            if whole:
                x = scaled(x, state.vectors, state.token_slots, columns)
            else:
                end = offset + columns.stop - columns.start
                middle = scaled(x[:, offset:end], state.vectors, state.token_slots, columns)
                x = torch.cat((x[:, :offset], middle, x[:, end:]), dim=-1)
            return (x, *output[1:]) if isinstance(output, tuple) else x
        scale_(x, state.vectors, state.token_slots, columns, runtime.plan, offset)
        return output

    return hook
