"""How an adapter lies in memory: one blob of bytes, which kernels read as it is.

A blob is packed once, when its adapter is read, in the adapter's own rank and dtype, and then only
copied. It holds no addresses, so it may lie anywhere: at a multiple of 16 bytes in an arena, which
blobs of any size share. `csrc/layout.h` is the same in C++.

- Blob: 8 int32 (`BLOB_FIELDS`), then for each layer one int32, where its record begins, or 0 for a
  layer without a generator, whose vectors are ones.
- Record: 16 int32 (`RECORD_FIELDS`), 8 pairs of int32 (first column of the vector store, width;
  ascending), the numerator's 33 coefficients and the denominator's 32 as float32, then
  `b_down` `[r]` float32, `b_up` `[D']`, `W_down` `[r, d]` and `W_up` transposed `[r, D']` in the
  adapter's dtype. D' counts the columns of the adapter's target modules alone; columns of the store
  that no pair names are exactly one.

Whatever has a place begins at a multiple of 16 bytes, and places are counted in 16 bytes: in a blob
from its start, in a record from the record's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..adapter import Array
from ..config import MAX_RATIONAL_DEGREE, POOLINGS

UNIT = 16
"""Bytes in which places are counted."""

MAGIC = 0x50454431
"""First word of a blob; another one with every change of the format."""

MAX_RANGES = 8
"""Most pieces of the columns of one adapter."""

BLOB_FIELDS = ("magic", "layers", "units")
"""Of the blob's 8 words; the others are 0. Units are those of the whole blob."""
BLOB_WORDS = 8

RECORD_FIELDS = (
    "dtype",
    "activation",
    "rank",
    "numerator_degree",
    "denominator_degree",
    "pooling",
    "input_norm",
    "hidden_size",
    "columns",
    "ranges",
    "down_bias",
    "bias",
    "down",
    "up",
)
"""Of the record's first 16 words; the others are 0. `columns` is D', `ranges` the number of pairs,
and the last four are places."""
RECORD_WORDS = 16

RANGES_AT = RECORD_WORDS
NUMERATOR_AT = RANGES_AT + 2 * MAX_RANGES
DENOMINATOR_AT = NUMERATOR_AT + 36
WEIGHTS_AT = DENOMINATOR_AT + MAX_RATIONAL_DEGREE
"""Words from a record's start; the numerator's are padded to a multiple of 16 bytes."""

DTYPES = ("float32", "bfloat16", "float16")
"""By their codes, as `ACTIVATION_CODES` and `config.POOLINGS` are too."""

ACTIVATION_CODES = ("gelu", "relu", "rational")
"""`config.ACTIVATIONS` in the order of the header; `tests/ops/test_native.py` compares them."""

_NUMPY = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}


def aligned(nbytes: int, to: int = UNIT) -> int:
    """The next multiple."""
    return -(-nbytes // to) * to


class BlobViews(NamedTuple):
    """Parts of a blob's layers that are alike, by name; bfloat16 as its bits, uint16.

    Attributes:
        header: `[layers, 16]` int32, see `RECORD_FIELDS`.
        ranges: `[layers, 8, 2]` int32.
        numerator: `[layers, 33]` float32.
        denominator: `[layers, 32]` float32.
        down_bias: `[layers, r]` float32.
        bias: `[layers, D']`.
        down: `[layers, r, d]`.
        up: `[layers, r, D']`.
    """

    header: Array
    ranges: Array
    numerator: Array
    denominator: Array
    down_bias: Array
    bias: Array
    down: Array
    up: Array


Ranges = tuple[tuple[int, int], ...]
"""First column of the vector store and width of each piece of a layer's D' columns, ascending."""


@dataclass(frozen=True)
class BlobLayout:
    """Where an adapter's values lie in its blob.

    Attributes:
        ranges: Each layer's; a layer without any has no generator.
        hidden_size: d.
        rank: r; 0 for static vectors.
        dtype: One of `DTYPES`.
    """

    ranges: tuple[Ranges, ...]
    hidden_size: int
    rank: int
    dtype: str

    def __post_init__(self) -> None:
        most = max(map(len, self.ranges), default=0)
        if most > MAX_RANGES:
            raise ValueError(f"a layer's columns are in {most} pieces, at most {MAX_RANGES} fit")

    @cached_property
    def stretches(self) -> list[slice]:
        """Consecutive layers with a generator on the same columns, whose records are alike."""
        found: list[slice] = []
        for layer, ranges in enumerate(self.ranges):
            if found and found[-1].stop == layer and self.ranges[layer - 1] == ranges:
                found[-1] = slice(found[-1].start, layer + 1)
            elif ranges:
                found.append(slice(layer, layer + 1))
        return found

    @cached_property
    def _records(self) -> list[int]:
        """Where each layer's record begins, 0 where there is none; and where the last one ends."""
        places, at = [], self.first_record
        for ranges in self.ranges:
            places.append(at if ranges else 0)
            at += self._parts(ranges)[-1] if ranges else 0
        return [*places, at]

    def _parts(self, ranges: Ranges) -> tuple[int, int, int, int, int]:
        """Where `b_down`, `b_up`, `W_down` and `W_up` begin in a record, and where it ends."""
        size = 2 if self.dtype != "float32" else 4
        columns = sum(width for _, width in ranges)
        down_bias = 4 * WEIGHTS_AT
        bias = down_bias + aligned(4 * self.rank)
        down = bias + aligned(size * columns)
        up = down + aligned(size * self.rank * self.hidden_size)
        return down_bias, bias, down, up, up + aligned(size * self.rank * columns)

    @property
    def first_record(self) -> int:
        """Where the first record begins, in bytes."""
        return aligned(4 * (BLOB_WORDS + len(self.ranges)))

    @property
    def nbytes(self) -> int:
        """Bytes of the blob."""
        return self._records[-1]

    def views(self, blob: Array, layers: slice) -> BlobViews:
        """The parts of some layers of one stretch by name, without a copy."""
        ranges = self.ranges[layers.start]
        columns = sum(width for _, width in ranges)
        down_bias, bias, down, up, record_bytes = self._parts(ranges)
        begin, number = self._records[layers.start], layers.stop - layers.start
        kind: Any = _NUMPY[self.dtype]

        def view(at: int, dtype: Any, *shape: int) -> Array:
            inside = [np.dtype(dtype).itemsize]
            for extent in reversed(shape[1:]):
                inside.insert(0, inside[0] * extent)
            strides = (record_bytes, *inside)
            return np.ndarray((number, *shape), dtype, blob, begin + at, strides)

        return BlobViews(
            view(0, np.int32, RECORD_WORDS),
            view(4 * RANGES_AT, np.int32, MAX_RANGES, 2),
            view(4 * NUMERATOR_AT, np.float32, MAX_RATIONAL_DEGREE + 1),
            view(4 * DENOMINATOR_AT, np.float32, MAX_RATIONAL_DEGREE),
            view(down_bias, np.float32, self.rank),
            view(bias, kind, columns),
            view(down, kind, self.rank, self.hidden_size),
            view(up, kind, self.rank, columns),
        )

    def begin(
        self,
        blob: Array,
        activations: Sequence[str],
        order: tuple[int, int],
        pooling: str,
        input_norm: bool,
    ) -> None:
        """Write all of a blob but its weights, with coefficients and a down bias of zeros.

        Args:
            blob: `[nbytes]` uint8; what is in it is overwritten.
            activations: Each layer's.
            order: m and n of the rational activation.
            pooling: One of `config.POOLINGS`.
            input_norm: Whether hidden states are normalised before they are pooled.
        """
        words = blob[: self.first_record].view(np.int32)
        words[:] = 0
        words[: len(BLOB_FIELDS)] = MAGIC, len(self.ranges), self.nbytes // UNIT
        words[BLOB_WORDS : BLOB_WORDS + len(self.ranges)] = [
            place // UNIT for place in self._records[:-1]
        ]
        fixed = [DTYPES.index(self.dtype), 0, self.rank, *order, POOLINGS.index(pooling)]
        fixed += [int(input_norm), self.hidden_size]
        for layers in self.stretches:
            ranges, views = self.ranges[layers.start], self.views(blob, layers)
            for part in (*views[:4], views.down_bias):
                part[...] = 0
            own = [*fixed, sum(width for _, width in ranges), len(ranges)]
            own += [at // UNIT for at in self._parts(ranges)[:-1]]
            views.header[:, : len(own)] = own
            views.header[:, 1] = [ACTIVATION_CODES.index(name) for name in activations[layers]]
            views.ranges[:, : len(ranges)] = ranges


class Record(NamedTuple):
    """One layer's generator as it lies in an arena; tensors are views of it.

    Attributes:
        activation: One of `config.ACTIVATIONS`.
        pooling: One of `config.POOLINGS`.
        input_norm: "rms" or None.
        ranges: First column of the store and width of each piece of the D' columns.
        numerator: `[m + 1]` float32.
        denominator: `[n]` float32.
        down_bias: `[r]` float32.
        bias: `[D']`.
        down: `[r, d]`.
        up: `[r, D']`.
    """

    activation: str
    pooling: str
    input_norm: str | None
    ranges: list[tuple[int, int]]
    numerator: Tensor
    denominator: Tensor
    down_bias: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor


def read_record(arena: Tensor, place: int, layer: int) -> Record | None:
    """One layer's generator; None where the adapter has none.

    Args:
        arena: uint8, on any device.
        place: Where the blob begins, in `UNIT`s.
        layer: The layer.

    Raises:
        ValueError: No blob begins there.
    """

    def view(start: int, dtype: torch.dtype, *shape: int) -> Tensor:
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        return arena[start : start + size].view(dtype).view(shape)

    begin = place * UNIT
    words = view(begin, torch.int32, BLOB_WORDS).tolist()
    if words[0] != MAGIC or not 0 <= layer < words[1]:
        raise ValueError(f"no blob with layer {layer} begins at byte {begin} of the arena")
    offset = int(view(begin + 4 * (BLOB_WORDS + layer), torch.int32, 1))
    if offset == 0:
        return None
    at = begin + offset * UNIT
    header = view(at, torch.int32, NUMERATOR_AT).tolist()
    kind, activation, r, m, n, pooling, norm, d, columns, ranges = header[:10]
    down_bias, bias, down, up = (at + UNIT * place for place in header[10:14])
    dtype = getattr(torch, DTYPES[kind])
    pairs = header[RANGES_AT : RANGES_AT + 2 * ranges]
    return Record(
        ACTIVATION_CODES[activation],
        POOLINGS[pooling],
        "rms" if norm else None,
        list(zip(pairs[::2], pairs[1::2], strict=True)),
        view(at + 4 * NUMERATOR_AT, torch.float32, m + 1),
        view(at + 4 * DENOMINATOR_AT, torch.float32, n),
        view(down_bias, torch.float32, r),
        view(bias, dtype, columns),
        view(down, dtype, r, d),
        view(up, dtype, r, columns),
    )
