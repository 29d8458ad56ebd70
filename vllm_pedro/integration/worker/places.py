"""Where a loaded vLLM model computes what PEDRO scales, on this device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from ...architectures import EXPERTS_UP, MODULES, architecture_of
from ...backbone import BackboneShape
from ...places import (
    Codes,
    Projection,
    codes_of,
    find_projections,
    fused_qkv,
    layer_lists,
    modules_of,
    packed,
    permuted,
    scaled_range,
    widths_of,
)


@dataclass(frozen=True)
class Place:
    """A projection of a loaded layer, of which the store holds some columns.

    Attributes:
        path: Where it is in the layer.
        codes: Of its outputs on this device.
        offset: First output that is scaled; the last is that of the store's last column.
        columns: The store's.
        is_input: It is its inputs that are scaled, and that the codes are of.
        is_experts: It is routed experts, and the codes are of what each computes within.
    """

    path: str
    codes: Codes
    offset: int
    columns: slice
    is_input: bool = False
    is_experts: bool = False

    @property
    def modules(self) -> set[str]:
        """What is scaled."""
        return {MODULES[number] for number in np.unique(modules_of(self.held))}

    @property
    def held(self) -> Codes:
        """Codes of the store's columns."""
        return self.codes[self.offset : self.offset + self.columns.stop - self.columns.start]


@dataclass(frozen=True)
class LayerPlaces:
    """A loaded decoder layer.

    Attributes:
        index: Its number in the whole model.
        layer: The layer.
        places: Its projections, as far as the store holds columns of them.
    """

    index: int
    layer: nn.Module
    places: list[Place]

    @property
    def codes(self) -> Codes:
        """Of the store's columns for this layer."""
        return np.concatenate([np.zeros(0, np.int64), *(place.held for place in self.places)])


def find_places(
    model: nn.Module, config: Any, shape: BackboneShape, modules: Sequence[str]
) -> list[LayerPlaces]:
    """Where a loaded vLLM model computes what is scaled, on this device.

    Args:
        model: The model.
        config: transformers', of its text part.
        shape: The backbone's, by its configuration.
        modules: The target modules that the engine serves.

    Raises:
        ValueError: There are no decoder layers with the projections that PEDRO scales, or they are
            not of the shape that the configuration promised.
    """
    found = {}
    # A tower may have a list of as many layers.
    part: Any = model
    if hasattr(model, "get_language_model"):
        part = part.get_language_model()
    for layers in layer_lists(part):
        found = {
            index: (layer, _projections(layer, config))
            for index, layer in enumerate(layers)
            if type(layer).__name__ != "PPMissingLayer"
        }
        if len(layers) == shape.num_layers and any(own for _, own in found.values()):
            break
    else:
        raise ValueError(
            f"{type(model).__name__} has no {shape.num_layers} decoder layers with projections of "
            "known names: PEDRO does not know where to scale it"
        )
    result = []
    for index, (layer, projections) in found.items():
        expected, widths = dict(shape.widths_of(index)), dict.fromkeys(MODULES, 0)
        for projection in projections:
            widths.update(projection.widths)
        if widths != expected:
            raise ValueError(
                f"layer {index} has projections of widths {widths}, expected {expected} by the "
                "model's configuration"
            )
        places: list[Place] = []
        begin = 0
        for projection in projections:
            scaled = scaled_range(projection.codes, modules)
            if not scaled.stop:
                continue
            columns = slice(begin, begin + scaled.stop - scaled.start)
            places.append(
                Place(
                    projection.path,
                    projection.codes,
                    scaled.start,
                    columns,
                    projection.is_input,
                    projection.is_experts,
                )
            )
            begin = columns.stop
        result.append(LayerPlaces(index, layer, places))
    return result


@dataclass(frozen=True)
class _Loaded(Projection):
    """A projection of a loaded layer, with the widths of its modules in the whole model."""

    widths: dict[str, int] = field(default_factory=dict)


def _projections(layer: nn.Module, config: Any) -> list[_Loaded]:
    widths: dict[int, dict[str, int]] = {}

    def codes(module: nn.Module, modules: tuple[str, ...], of_input: bool) -> Codes | None:
        module = getattr(module, "base_layer", module)  # within a LoRA layer
        if of_input:
            widths[id(module)], own = _inputs(module, modules[0])
            return own
        if modules == (EXPERTS_UP,):
            widths[id(module)], own = _experts(module)
            return own
        whole = _whole(module, modules, config)
        if whole is None:
            return None
        joined = np.concatenate(whole)
        widths[id(module)] = {m: n for m, n in widths_of([joined]).items() if m in modules}
        return _on_this_device(module, whole)

    found = find_projections(layer, config, codes)
    return [
        _Loaded(p.path, p.codes, p.is_input, widths[id(getattr(m, "base_layer", m))])
        for p in found
        for m in (layer.get_submodule(p.path),)
    ]


def _inputs(module: Any, name: str) -> tuple[dict[str, int], Codes]:
    """Width of a projection's inputs in the whole model, and codes of those on this device."""
    width = module.input_size
    codes = codes_of(name, range(width))
    if module.input_is_parallel:
        codes = codes[module.tp_rank * width // module.tp_size :][: width // module.tp_size]
    return {name: width}, codes


def _experts(module: Any) -> tuple[dict[str, int], Codes]:
    """Width of an expert in the whole model, and codes of what it computes on this device."""
    config = module.moe_config
    share = config.intermediate_size_per_partition_unpadded
    first = config.moe_parallel_config.tp_rank * share
    last = min(first + share, config.intermediate_size)
    return {EXPERTS_UP: config.intermediate_size}, codes_of(EXPERTS_UP, range(first, last))


def _whole(module: Any, modules: tuple[str, ...], config: Any) -> list[Codes] | None:
    """Codes of a projection in the whole model, in the parts that ranks share one by one."""
    architecture = architecture_of(config)
    if hasattr(module, "total_num_kv_heads"):
        heads, kv_heads = module.total_num_heads, module.total_num_kv_heads
        parts = [
            codes_of(modules[0], range(heads * module.head_size)),
            codes_of(modules[1], range(kv_heads * module.head_size)),
            codes_of(modules[2], range(kv_heads * module.v_head_size)),
        ]
        if architecture is not None and architecture.is_permuted:
            parts[:2] = permuted(parts[0], heads), permuted(parts[1], kv_heads)
        return parts
    sizes = getattr(module, "output_sizes", None)
    if sizes is not None and len(sizes) == len(modules):
        return [codes_of(m, range(size)) for m, size in zip(modules, sizes, strict=True)]
    width = getattr(module, "output_size", None)
    if width is None:
        return None
    if len(modules) == 1:
        return [codes_of(modules[0], range(width))]
    if len(modules) == 2:
        return [packed(dict.fromkeys(modules, width // 2))]
    return [fused_qkv(width, config)]


def _on_this_device(module: Any, parts: list[Codes]) -> Codes:
    """The outputs that this rank of tensor parallelism computes, or is given."""
    # `ReplicatedLinear` has a rank too, and all outputs.
    is_shared = hasattr(module, "output_size_per_partition")
    if not is_shared or module.tp_size == 1 or module.gather_output:
        return np.concatenate(parts)
    size, rank = module.tp_size, module.tp_rank
    shares = [(rank, size)] * len(parts)
    if hasattr(module, "total_num_kv_heads"):
        replicas = module.num_kv_head_replicas
        shares[1:] = [(rank // replicas, size // replicas)] * 2
    return np.concatenate(
        [
            part[share * len(part) // number : (share + 1) * len(part) // number]
            for part, (share, number) in zip(parts, shares, strict=True)
        ]
    )
