"""Adapters as blobs: how large one is, and how it is packed. `ops/layout.py` has the format."""

from __future__ import annotations

import numpy as np

from ..adapter import Array, StoredAdapter
from ..backbone import BackboneShape
from ..config import PedroConfig
from ..ops.layout import BlobLayout, aligned

ALIGNMENT = 256
"""Blobs begin at multiples of so many bytes, and take as many."""


def blob_layout(config: PedroConfig, dtype: str, shape: BackboneShape) -> BlobLayout:
    """The layout of an adapter's blob.

    Args:
        config: The adapter's.
        dtype: What its values are kept as, see `StoredAdapter.dtype`.
        shape: The backbone's.
    """
    columns = sum(shape.split_widths(config.target_modules))
    return BlobLayout(shape.num_layers, shape.hidden_size, config.r, columns, dtype)


def blob_bytes(config: PedroConfig, dtype: str, shape: BackboneShape) -> int:
    """What an adapter takes of an arena; arguments as `blob_layout`'s."""
    return aligned(blob_layout(config, dtype, shape).nbytes, ALIGNMENT)


def pack(
    adapter: StoredAdapter, shape: BackboneShape, columns: dict[str, slice], blob: Array
) -> None:
    """Write an adapter's blob.

    By NumPy: torch would start its threads for each of hundreds of copies of some kilobytes.

    Args:
        adapter: What is packed.
        shape: The backbone's.
        columns: Where each target module's columns are in the vector store.
        blob: uint8 of the layout's size or more; what is in it is overwritten.
    """
    config, layout = adapter.config, blob_layout(adapter.config, adapter.dtype, shape)
    # The adapter's columns are in the order of its config, the blob's in that of the store.
    widths = dict(
        zip(config.target_modules, shape.split_widths(config.target_modules), strict=True)
    )
    ordered = sorted(widths, key=lambda module: columns[module].start)
    ranges: list[tuple[int, int]] = []
    for module in ordered:
        start, width = columns[module].start, widths[module]
        if ranges and sum(ranges[-1]) == start:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + width)
        else:
            ranges.append((start, width))
    views = layout.begin(
        blob[: layout.nbytes],
        ranges,
        [config.activation_of(i) for i in range(shape.num_layers)],
        config.rational_order,
        config.pooling,
        config.input_norm is not None,
    )
    begins = np.cumsum([0, *widths.values()])
    own = dict(zip(widths, begins.tolist(), strict=False))
    for layers, weights in adapter.blocks():
        at = 0
        for module in ordered:
            width = widths[module]
            here, there = slice(own[module], own[module] + width), slice(at, at + width)
            views.bias[layers, there] = weights.bias[:, here]
            if weights.up is not None:
                views.up[layers, :, there] = weights.up[:, here].transpose(0, 2, 1)
            at += width
        if weights.down is not None:
            views.down[layers] = weights.down
        for values, part in (
            (weights.numerator, views.numerator),
            (weights.denominator, views.denominator),
            (weights.down_bias, views.down_bias),
        ):
            if values is None:
                continue
            if values.dtype == np.uint16:  # bfloat16: the upper half of float32
                values = (values.astype(np.uint32) << 16).view(np.float32)
            part[layers, : values.shape[1]] = values
