"""Which entry of an adapter's vectors each column of the vector store holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..architectures import MODULES
from ..backbone import BackboneShape
from ..ops.layout import MAX_RANGES, Ranges
from ..places import Codes, entries_of, modules_of


class Part(NamedTuple):
    """What an adapter has in a layer's columns of the store.

    Attributes:
        ranges: The pieces of the columns that it has, or fills with ones.
        copies: Where to copy from, among the layer's entries of l, and to, among the D' columns.
        ones: The D' columns that are filled with ones.
    """

    ranges: Ranges
    copies: tuple[tuple[slice | Codes, slice | Codes], ...]
    ones: Codes


class StoreColumns:
    """Which entry of l each column of the store holds, layer by layer.

    The same for all adapters and applied once, when one is packed: slices of tensor parallelism,
    permuted and interleaved projections are other codes, and nothing in a step knows of them.

    Args:
        shape: The backbone's.
        layers: Each layer's codes; none where the layer has no projection, or is not on this
            device.
    """

    def __init__(self, shape: BackboneShape, layers: Iterable[Codes]) -> None:
        known: dict[bytes, Codes] = {}
        self.shape = shape
        self.layers = [known.setdefault(codes.tobytes(), codes) for codes in layers]
        if len(self.layers) != shape.num_layers:
            raise ValueError(f"codes of {len(self.layers)} layers for {shape.num_layers}")
        self._parts: dict[tuple[str, ...], tuple[Part, ...]] = {}

    def widths(self) -> list[int]:
        """Columns of each layer."""
        return [len(codes) for codes in self.layers]

    def ranges(self, modules: Sequence[str]) -> tuple[Ranges, ...]:
        """The columns of an adapter with these target modules, in each layer."""
        return tuple(part.ranges for part in self.parts(tuple(modules)))

    def parts(self, modules: tuple[str, ...]) -> tuple[Part, ...]:
        """What an adapter with these target modules, in its own order, has in each layer."""
        if modules in self._parts:
            return self._parts[modules]
        made: dict[tuple[int, tuple[int, ...]], Part] = {}
        result = []
        for layer, codes in enumerate(self.layers):
            widths = tuple(self.shape.split_widths(modules, layer))
            key = (id(codes), widths)
            if key not in made:
                made[key] = _part(codes, modules, widths)
            result.append(made[key])
        self._parts[modules] = tuple(result)
        return self._parts[modules]


def _part(codes: Codes, modules: tuple[str, ...], widths: tuple[int, ...]) -> Part:
    begins = np.full(len(MODULES), -1, np.int64)
    for module, begin in zip(modules, np.cumsum([0, *widths]).tolist(), strict=False):
        begins[MODULES.index(module)] = begin
    begin = begins[modules_of(codes)]
    columns = np.flatnonzero(begin >= 0)
    if not len(columns):
        return Part((), (), columns)
    ranges = _runs(columns, columns)
    if len(ranges) > MAX_RANGES:  # interleaved: what lies between is filled
        columns = np.arange(columns[0], columns[-1] + 1)
        ranges = _runs(columns, columns)
    begin, entries = begin[columns], entries_of(codes[columns])
    own = np.flatnonzero(begin >= 0)
    sources = (begin + entries)[own]
    copies: list[tuple[slice | Codes, slice | Codes]] = [
        (slice(int(sources[at]), int(sources[at]) + n), slice(int(own[at]), int(own[at]) + n))
        for at, n in _runs(sources, own, of_indices=True)
    ]
    if len(copies) > _MOST_SLICES:
        copies = [(sources, own)]
    return Part(ranges, tuple(copies), np.flatnonzero(begin < 0))


_MOST_SLICES = 64
"""So many copies of slices are faster than one by an array of indices."""


def _runs(values: Codes, others: Codes, of_indices: bool = False) -> Ranges:
    """First value (or its index) and length of each run in which both arrays go up by ones."""
    breaks = np.flatnonzero((np.diff(values) != 1) | (np.diff(others) != 1)) + 1
    starts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), len(values)]
    return tuple(
        (start if of_indices else int(values[start]), end - start)
        for start, end in zip(starts, ends, strict=True)
    )
