"""Hooks on a vLLM model: generate vectors at each layer's input, apply them to its projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..config import TARGET_MODULES, BackboneShape
from ..serving.layer import PedroLayer
from ..serving.plan import Ints
from ..serving.runtime import PedroRuntime
from ..serving.store import VectorStore

PACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""vLLM's packed projections and what they pack, in the order of their columns."""


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


def is_compiled(vllm_config: Any) -> bool:
    """Whether vLLM hands the model to torch.compile."""
    return bool(vllm_config.compilation_config.mode)


class HookedModel:
    """A vLLM model with PEDRO's part in each decoder layer, and the steps it is prepared for.

    Forward hooks leave modules and parameter names as they are, so weights load and reload as ever.

    Args:
        model: vLLM's model.
        shape: The backbone's shape by its configuration.
        runtime: Whose vectors the layers generate and read.
        is_compiled: Whether vLLM compiles the model; steps outside of the graph work all the same.

    Raises:
        ValueError: The model is not of the shape that its configuration promised.
    """

    def __init__(
        self, model: nn.Module, shape: BackboneShape, runtime: PedroRuntime, is_compiled: bool
    ) -> None:
        layers = find_decoder_layers(model)
        if len(layers) != shape.num_layers:
            raise ValueError(f"the model has {len(layers)} decoder layers, not {shape.num_layers}")
        expected = {module: shape.widths[module] for module in TARGET_MODULES}
        self.runtime = runtime
        self._switch = None if is_compiled else ForwardSwitch()
        for index, layer in enumerate(layers):
            if layer_widths(layer) != expected:
                raise ValueError(
                    f"layer {index} has projections of widths {layer_widths(layer)}, "
                    f"expected {expected}"
                )
            _hook_layer(layer, runtime.layers[index], runtime.store, self._switch)

    def prepare_step(self, request_ids: Sequence[str], lengths: Ints, computed: Ints) -> None:
        """See `PedroRuntime.prepare_step`."""
        self.runtime.prepare_step(request_ids, lengths, computed)
        self.switch()

    def clear_step(self) -> None:
        """See `PedroRuntime.clear_step`."""
        self.runtime.clear_step()
        self.switch()

    def switch(self) -> None:
        """Have in the layers what the step that the store holds needs."""
        if self._switch is not None:
            store = self.runtime.store
            self._switch(store.has_prefills, store.scales_rows)


class ForwardSwitch:
    """Without a compiler: PEDRO's part of each layer, there only in steps that need it.

    A step without adapters then runs the very code of an engine without PEDRO, and a decode step
    none of the generators'. Modules get a `forward` of their own in place of a hook, because a
    module with hooks takes a longer way through `nn.Module.__call__`, at each call.
    """

    def __init__(self) -> None:
        self._generating: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._scaling: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._generates = self._scales = False

    def add_generator(self, norm: nn.Module, state: PedroLayer) -> None:
        """Run a layer's generators on what its input norm reads."""
        original, generate = norm.forward, state.generate

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            hidden = output[1] if isinstance(output, tuple) else args[0]
            generate(hidden)
            return output

        self._generating.append((norm, forward))

    def add_scaling(
        self, projection: nn.Module, state: PedroLayer, ranges: tuple[int, int, int]
    ) -> None:
        """Scale a packed projection's output in place."""
        original, scale_ = projection.forward, state.scale_

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            x = output[0] if isinstance(output, tuple) else output
            scale_(x, ranges)
            return output

        self._scaling.append((projection, forward))

    def __call__(self, generates: bool, scales: bool) -> None:
        """Get ready for a step.

        Args:
            generates: Whether it generates vectors.
            scales: Whether it has rows with an adapter.
        """
        if generates != self._generates:
            self._set(self._generating, generates)
            self._generates = generates
        if scales != self._scales:
            self._set(self._scaling, scales)
            self._scales = scales

    @staticmethod
    def _set(forwards: list[tuple[nn.Module, Callable[..., Any]]], on: bool) -> None:
        for module, forward in forwards:
            if on:
                module.__dict__["forward"] = forward
            else:
                del module.__dict__["forward"]


def _hook_layer(
    layer: Any, state: PedroLayer, store: VectorStore, switch: ForwardSwitch | None
) -> None:
    """Hooks for the compiler to trace, or, without one, forwards to switch."""
    layer.add_module("pedro", state)
    widths, stored = layer_widths(layer), store.columns
    attention, mlp = layer.self_attn, layer.mlp
    compiled_elsewhere = set()
    if switch is not None:
        switch.add_generator(layer.input_layernorm, state)
    else:
        layer.input_layernorm.register_forward_hook(_input_hook(state, store))
        if "v_proj" in stored and isinstance(getattr(attention, "attn", None), nn.Module):
            attention.attn.register_forward_pre_hook(_value_hook(state))
        if "up_proj" in stored and "gate_proj" not in stored and hasattr(mlp, "act_fn"):
            mlp.act_fn.register_forward_hook(_activation_hook(state, stored["up_proj"]))
            compiled_elsewhere.add("gate_up_proj")
    for name, packed in PACKED.items():
        columns = _columns(stored, packed)
        if columns is None:
            continue
        projection = getattr(attention if name == "qkv_proj" else mlp, name)
        offset = 0
        for module in packed:
            if module in stored:
                break
            offset += widths[module]
        if switch is not None:
            width = columns.stop - columns.start
            switch.add_scaling(projection, state, (offset, columns.start, width))
            continue
        total = sum(widths[module] for module in packed)
        hook = _scale_hook(state, store, columns, offset, total, name in compiled_elsewhere)
        projection.register_forward_hook(hook)


def _columns(columns: dict[str, slice], packed: tuple[str, ...]) -> slice | None:
    """The store's columns from the first to the last module of a packed projection it holds."""
    held = [columns[module] for module in packed if module in columns]
    return slice(held[0].start, held[-1].stop) if held else None


def _input_hook(state: PedroLayer, store: VectorStore) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # vLLM's norms take (x, residual) and return (normed, residual + x), which is the layer's
        # input; in the first layer, and in models without the fused form, the argument itself is.
        hidden = output[1] if isinstance(output, tuple) else args[0]
        if torch.compiler.is_compiling():
            # A copy, not the residual itself: Inductor keeps that in float32 across fused kernels,
            # and an operator that reads it would force it into 16 bits there, for base rows too.
            hidden = hidden * state.one
        elif not store.has_prefills:
            return
        state.generate(hidden)

    return hook


def _scale_hook(
    state: PedroLayer,
    store: VectorStore,
    columns: slice,
    offset: int,
    total: int,
    compiled_elsewhere: bool,
) -> Callable[..., Any]:
    """Scale a packed projection: the fastest exact form of each mode, see docs/kernels.md."""
    width = columns.stop - columns.start
    ranges = (offset, columns.start, width)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if not torch.compiler.is_compiling():
            # The operator would return at once, but getting there takes a while, in each layer.
            if store.scales_rows:
                state.scale_(x, ranges)
            return None
        if compiled_elsewhere:
            return output
        if width == total:
            x = state.scaled(x, columns)
        else:
            end = offset + width
            middle = state.scaled(x[:, offset:end], columns)
            x = torch.cat((x[:, :offset], middle, x[:, end:]), dim=-1)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return hook


def _value_hook(state: PedroLayer) -> Callable[..., Any]:
    """Compiled, hand V to attention as a tensor of its own.

    As it comes it is a view of the scaled packed projection, which Inductor would then have to
    write out whole, Q and K too, although whoever else reads those computes them on the fly.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.compiler.is_compiling() or len(args) < 3:
            return None
        return (*args[:2], args[2] * state.one, *args[3:])

    return hook


def _activation_hook(state: PedroLayer, columns: slice) -> Callable[..., Any]:
    """Compiled, scale Up after the activation, act(G) * U * l, where Inductor fuses all of it.

    Scaled before, gate and up would have to be put together again for the activation to take them
    apart, and on the CPU Inductor writes that out.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.compiler.is_compiling():
            return None
        return state.scaled(output, columns)

    return hook
