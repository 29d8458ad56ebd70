"""Where a transformers model computes the five projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..backbone import BLOCKS, PACKED, BackboneShape, is_packed
from ..errors import PedroError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Projections:
    """Where a model computes the five projections.

    Attributes:
        modules: paths of modules in a decoder layer, with the projections each computes.
        widths: output width of each projection.
    """

    modules: dict[str, tuple[str, ...]]
    widths: dict[str, int]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise PedroError(
            f"{type(model).__name__}: looked for the decoder layers in 'model.layers' and found "
            "none; PEDRO needs a decoder-only causal language model of the Llama kind (Llama, "
            "Mistral, Qwen2, Qwen3, Gemma, Phi-3)"
        )
    return layers


def device_of(index: int, layer: nn.Module) -> torch.device:
    """Where the generator of decoder layer `index` belongs.

    Raises:
        PedroError: the layer is not in memory.
    """
    device = next(layer.parameters()).device
    if device.type == "meta":
        raise PedroError(
            f"layer {index} of the backbone is not in memory; load it without offloading to disk"
        )
    return device


def find_projections(model: PreTrainedModel, shape: BackboneShape) -> Projections:
    """Find the five projections, and check that they are alike in every layer.

    Raises:
        PedroError: names the layer, what was looked for and what is there.
    """
    layers = decoder_layers(model)
    if len(layers) != shape.num_layers:
        raise PedroError(
            f"{type(model).__name__}: expected {shape.num_layers} decoder layers by its config, "
            f"found {len(layers)}"
        )
    packs = is_packed(model.config.model_type)
    modules: dict[str, tuple[str, ...]] = {}
    for packed, names in PACKED.items():
        path = f"{BLOCKS[packed]}.{packed}"
        if packs and _submodule(layers[0], path) is not None:
            modules[path] = names
        else:
            modules.update({f"{BLOCKS[name]}.{name}": (name,) for name in names})
    for index, layer in enumerate(layers):
        for path, names in modules.items():
            module = _submodule(layer, path)
            if module is None:
                raise PedroError(
                    f"{type(model).__name__}: looked for '{path}' in decoder layer {index} and "
                    f"found no such module, only "
                    f"{sorted(name for name, _ in layer.named_children())} with "
                    f"{_grandchildren(layer)}: the projections of this architecture are not known"
                )
            want = sum(shape.widths[name] for name in names)
            found = getattr(module, "out_features", want)
            if found != want:
                raise PedroError(
                    f"{type(model).__name__}: decoder layer {index}, '{path}': expected "
                    f"{want} output features by the model's config, found {found}"
                )
    return Projections(modules, dict(shape.widths))


def _submodule(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _grandchildren(layer: nn.Module) -> list[str]:
    return sorted(name for name, _ in layer.named_modules() if name.count(".") == 1)
