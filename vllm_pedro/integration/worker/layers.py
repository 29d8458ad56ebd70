"""Hooks on a vLLM model: generate vectors at each layer's input, apply them to its projections."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...architectures import architecture_of
from ...serving.layer import PedroLayer
from ...serving.plan import Ints
from ...serving.runtime import PedroRuntime
from ...serving.store import VectorStore
from ..options import GENERATORS
from .compiled import Generation, activation_hook, scale_hook, scale_input_hook, value_hook
from .eager import ForwardSwitch
from .experts import scaling
from .inputs import input_of_layer, input_of_norm
from .places import LayerPlaces

INPUT_NORMS = (
    "input_layernorm",
    "attention_layernorm",
    "attention_norm",
    "ln_1",
    "ln_attn",
    "operator_norm",
)
"""What vLLM's layers call the norm of their input. It sees the residual stream whole, also where
the layer gets it in two parts."""


def is_compiled(vllm_config: Any) -> bool:
    """Whether vLLM hands the model to torch.compile."""
    return bool(vllm_config.compilation_config.mode)


def is_split(vllm_config: Any) -> bool:
    """Whether vLLM splits the compiled graph at the generators, see `split_at_generators`."""
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled

    # Breakable graphs are captured around the model, not around its compiled pieces.
    splits = vllm_config.compilation_config.splitting_ops or ()
    return GENERATORS in splits and not is_breakable_cudagraph_enabled()


class HookedModel:
    """A vLLM model with PEDRO's part in each decoder layer, and the steps it is prepared for.

    Forward hooks leave modules and parameter names as they are, so weights load and reload as ever.

    Args:
        layers: The layers on this device.
        config: transformers', of the model's text part.
        runtime: Whose vectors the layers generate and read.
        is_compiled: Whether vLLM compiles the model; steps outside of the graph work all the same.
        is_split: Whether the compiled graph is split at the generators.

    Raises:
        ValueError: A layer's input cannot be told.
    """

    def __init__(
        self,
        layers: list[LayerPlaces],
        config: Any,
        runtime: PedroRuntime,
        is_compiled: bool,
        is_split: bool = False,
    ) -> None:
        self.runtime = runtime
        self.is_split = is_split
        self._switch = None if is_compiled else ForwardSwitch()
        for found in layers:
            if found.places:
                state, store = runtime.layers[found.index], runtime.store
                _hook_layer(found, config, state, store, self._switch, is_split)

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


def _input_of(layer: nn.Module, config: Any) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The module that sees the residual stream at a layer's input, and what finds it there.

    Raises:
        ValueError: The layer gets it in two parts, and has no norm of a known name.
    """
    architecture = architecture_of(config)
    if architecture is None or architecture.has_input_norm:
        for name in INPUT_NORMS:
            norm = getattr(layer, name, None)
            if isinstance(norm, nn.Module):
                return norm, input_of_norm
    names = list(inspect.signature(layer.forward).parameters)
    is_split = "residual" in names and (architecture is None or architecture.has_input_norm)
    if is_split or "hidden_states" not in names:
        raise ValueError(
            f"{type(layer).__name__} has no input norm of a known name ({', '.join(INPUT_NORMS)}): "
            "PEDRO does not know where its residual stream is"
        )
    return layer, input_of_layer(names.index("hidden_states"))


def _hook_layer(
    found: LayerPlaces,
    config: Any,
    state: PedroLayer,
    store: VectorStore,
    switch: ForwardSwitch | None,
    is_split: bool,
) -> None:
    """Hooks for the compiler to trace, or, without one, forwards to switch."""
    layer = found.layer
    layer.add_module("pedro", state)
    reads_input, input_of = _input_of(layer, config)
    if switch is not None:
        if reads_input is layer:
            switch.add_generator_before(layer, state, input_of)
        else:
            switch.add_generator(reads_input, state, input_of)
    else:
        generation = Generation(state, store, input_of, is_split)
        if reads_input is layer:
            layer.register_forward_pre_hook(generation.input_hook, with_kwargs=True)
        else:
            reads_input.register_forward_hook(generation.input_hook, with_kwargs=True)
        first = found.places[0]
        projection = layer.get_submodule(first.path)
        if first.is_input or first.is_experts:
            projection.register_forward_pre_hook(generation.projection_hook)
        else:
            projection.register_forward_hook(generation.projection_hook)
    for place in found.places:
        projection = layer.get_submodule(place.path)
        width = place.columns.stop - place.columns.start
        if place.is_experts:
            replacement = scaling(projection, state, place.columns)
            if switch is not None:
                switch.add_experts(*replacement)
            else:
                setattr(*replacement)
            continue
        if switch is not None:
            add = switch.add_scaling_before if place.is_input else switch.add_scaling
            add(projection, state, (place.offset, place.columns.start, width))
            continue
        if place.is_input:
            projection.register_forward_pre_hook(scale_input_hook(state, store, place.columns))
            continue
        parent: Any = layer.get_submodule(place.path.rpartition(".")[0])
        compiled_elsewhere = False
        if "v_proj" in place.modules and isinstance(getattr(parent, "attn", None), nn.Module):
            parent.attn.register_forward_pre_hook(value_hook(state))
        act_fn = getattr(parent, "act_fn", None)
        if place.modules == {"up_proj"} and width < len(place.codes) and act_fn is not None:
            act_fn.register_forward_hook(activation_hook(state, place.columns))
            compiled_elsewhere = True
        hook = scale_hook(
            state, store, place.columns, place.offset, len(place.codes), compiled_elsewhere
        )
        projection.register_forward_hook(hook)
