"""Where a transformers model computes the five projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..backbone import BackboneShape
from ..errors import PedroError
from ..places import Projection, transformers_layers, transformers_projections, widths_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    layers = transformers_layers(model)
    if layers is None:
        raise PedroError(
            f"{type(model).__name__}: looked for the decoder layers of a decoder-only causal "
            "language model and found none"
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


def find_projections(model: PreTrainedModel, shape: BackboneShape) -> list[list[Projection]]:
    """Find each layer's projections, and check that their widths are the shape's.

    Raises:
        PedroError: names the layer, what was looked for and what is there.
    """
    layers = decoder_layers(model)
    if len(layers) != shape.num_layers:
        raise PedroError(
            f"{type(model).__name__}: expected {shape.num_layers} decoder layers by its config, "
            f"found {len(layers)}"
        )
    config = model.config.get_text_config()
    found = []
    for index, layer in enumerate(layers):
        projections = transformers_projections(layer, config)
        want, widths = dict(shape.widths_of(index)), widths_of(p.codes for p in projections)
        if widths != want:
            raise PedroError(
                f"{type(model).__name__}: decoder layer {index}: expected projections of widths "
                f"{want} by the model's config, found {widths} in "
                f"{[p.path for p in projections]} of {_grandchildren(layer)}: the projections of "
                "this architecture are not known"
            )
        found.append(projections)
    return found


def _grandchildren(layer: nn.Module) -> list[str]:
    return sorted(name for name, _ in layer.named_modules() if name.count(".") == 1)
