"""Adapters as blobs: how large one is, and how it is packed. `ops/layout.py` has the format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..adapter import Array, StoredAdapter
from ..backbone import BackboneShape
from ..config import PedroConfig
from ..ops.layout import BlobLayout, aligned
from .columns import StoreColumns

ALIGNMENT = 256
"""Blobs begin at multiples of so many bytes, and take as many."""

ONE = {"float32": 1.0, "float16": 1.0, "bfloat16": 0x3F80}
"""The value 1 as blobs hold it."""


def blob_layout(config: PedroConfig, dtype: str, columns: StoreColumns) -> BlobLayout:
    """The layout of an adapter's blob.

    Args:
        config: The adapter's.
        dtype: What its values are kept as, see `StoredAdapter.dtype`.
        columns: The vector store's.
    """
    ranges = columns.ranges(config.target_modules)
    return BlobLayout(ranges, columns.shape.hidden_size, config.r, dtype)


def most_bytes(shape: BackboneShape, modules: Sequence[str], rank: int, dtype: str) -> int:
    """What an adapter takes of an arena on any device, at most.

    Args:
        shape: The backbone's.
        modules: The adapter's target modules.
        rank: Its r.
        dtype: See `blob_layout`.
    """
    if shape.is_grouped and not {"q_proj", "k_proj", "v_proj"}.isdisjoint(modules):
        modules = (*modules, *{"q_proj", "k_proj", "v_proj"}.difference(modules))
    layers = (sum(shape.split_widths(modules, layer)) for layer in range(shape.num_layers))
    ranges = tuple(((0, width),) if width else () for width in layers)
    return aligned(BlobLayout(ranges, shape.hidden_size, rank, dtype).nbytes, ALIGNMENT)


def blob_bytes(config: PedroConfig, dtype: str, shape: BackboneShape) -> int:
    """`most_bytes` of an adapter."""
    return most_bytes(shape, config.target_modules, config.r, dtype)


def pack(adapter: StoredAdapter, columns: StoreColumns, blob: Array) -> None:
    """Write an adapter's blob.

    By NumPy: torch would start its threads for each of hundreds of copies of some kilobytes.

    Args:
        adapter: What is packed.
        columns: The vector store's.
        blob: uint8 of the layout's size or more; what is in it is overwritten.
    """
    config, layout = adapter.config, blob_layout(adapter.config, adapter.dtype, columns)
    parts = columns.parts(tuple(config.target_modules))
    layout.begin(
        blob[: layout.nbytes],
        [config.activation_of(i) for i in range(len(parts))],
        config.rational_order,
        config.pooling,
        config.input_norm is not None,
    )
    for layers, weights in adapter.blocks():
        for here in _alike(parts, layers):
            part, views = parts[here.start], layout.views(blob, here)
            own = slice(here.start - layers.start, here.stop - layers.start)
            if len(part.ones):
                views.bias[:, part.ones] = ONE[adapter.dtype]
                views.up[:, :, part.ones] = 0
            for source, target in part.copies:
                views.bias[:, target] = weights.bias[own, source]
                if weights.up is not None:
                    views.up[:, :, target] = weights.up[own, source].transpose(0, 2, 1)
            if weights.down is not None:
                views.down[...] = weights.down[own]
            for values, stored in (
                (weights.numerator, views.numerator),
                (weights.denominator, views.denominator),
                (weights.down_bias, views.down_bias),
            ):
                if values is None:
                    continue
                values = values[own]
                if values.dtype == np.uint16:  # bfloat16: the upper half of float32
                    values = (values.astype(np.uint32) << 16).view(np.float32)
                stored[:, : values.shape[1]] = values


def _alike(parts: Sequence[object], layers: slice) -> list[slice]:
    """The layers in stretches that have the same part, without those that have none."""
    found: list[slice] = []
    for layer in range(layers.start, layers.stop):
        if found and found[-1].stop == layer and parts[layer] is parts[layer - 1]:
            found[-1] = slice(found[-1].start, layer + 1)
        elif parts[layer].ranges:  # type: ignore[attr-defined]
            found.append(slice(layer, layer + 1))
    return found
