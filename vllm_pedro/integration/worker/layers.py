"""Hooks on a vLLM model: generate vectors at each layer's input, apply them to its projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...backbone import BLOCKS, PACKED, TARGET_MODULES, BackboneShape
from ...serving.layer import PedroLayer
from ...serving.plan import Ints
from ...serving.runtime import PedroRuntime
from ...serving.store import VectorStore
from ..options import GENERATORS
from .compiled import Generation, activation_hook, scale_hook, value_hook
from .eager import ForwardSwitch


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
        model: vLLM's model.
        shape: The backbone's shape by its configuration.
        runtime: Whose vectors the layers generate and read.
        is_compiled: Whether vLLM compiles the model; steps outside of the graph work all the same.
        is_split: Whether the compiled graph is split at the generators.

    Raises:
        ValueError: The model is not of the shape that its configuration promised.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: BackboneShape,
        runtime: PedroRuntime,
        is_compiled: bool,
        is_split: bool = False,
    ) -> None:
        layers = find_decoder_layers(model)
        if len(layers) != shape.num_layers:
            raise ValueError(f"the model has {len(layers)} decoder layers, not {shape.num_layers}")
        expected = {module: shape.widths[module] for module in TARGET_MODULES}
        self.runtime = runtime
        self.is_split = is_split
        self._switch = None if is_compiled else ForwardSwitch()
        for index, layer in enumerate(layers):
            if layer_widths(layer) != expected:
                raise ValueError(
                    f"layer {index} has projections of widths {layer_widths(layer)}, "
                    f"expected {expected}"
                )
            _hook_layer(layer, runtime.layers[index], runtime.store, self._switch, is_split)

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


def _hook_layer(
    layer: Any, state: PedroLayer, store: VectorStore, switch: ForwardSwitch | None, is_split: bool
) -> None:
    """Hooks for the compiler to trace, or, without one, forwards to switch."""
    layer.add_module("pedro", state)
    widths, stored = layer_widths(layer), store.columns
    attention, mlp = layer.self_attn, layer.mlp
    compiled_elsewhere = set()
    if switch is not None:
        switch.add_generator(layer.input_layernorm, state)
    else:
        generation = Generation(state, store, is_split)
        layer.input_layernorm.register_forward_hook(generation.input_hook)
        first = next(name for name, packed in PACKED.items() if _columns(stored, packed))
        projection = getattr(getattr(layer, BLOCKS[first]), first)
        projection.register_forward_hook(generation.projection_hook)
        if "v_proj" in stored and isinstance(getattr(attention, "attn", None), nn.Module):
            attention.attn.register_forward_pre_hook(value_hook(state))
        if "up_proj" in stored and "gate_proj" not in stored and hasattr(mlp, "act_fn"):
            mlp.act_fn.register_forward_hook(activation_hook(state, stored["up_proj"]))
            compiled_elsewhere.add("gate_up_proj")
    for name, packed in PACKED.items():
        columns = _columns(stored, packed)
        if columns is None:
            continue
        projection = getattr(getattr(layer, BLOCKS[name]), name)
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
        hook = scale_hook(state, store, columns, offset, total, name in compiled_elsewhere)
        projection.register_forward_hook(hook)


def _columns(columns: dict[str, slice], packed: tuple[str, ...]) -> slice | None:
    """The store's columns from the first to the last module of a packed projection it holds."""
    held = [columns[module] for module in packed if module in columns]
    return slice(held[0].start, held[-1].stop) if held else None
