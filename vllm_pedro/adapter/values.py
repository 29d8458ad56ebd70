"""An adapter in host memory: in float32, or as wide as in its file."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ..config import PedroConfig
from .header import Header, Run
from .names import (
    BIAS,
    DENOMINATOR,
    DOWN,
    DOWN_BIAS,
    LAYER_NAME,
    NUMERATOR,
    UP,
    Array,
    tensor_name,
)


class LayerTensors(NamedTuple):
    """One layer's tensors, as `generate_vectors` takes them; None where the adapter has none."""

    down: Tensor | None  # [r, d]
    up: Tensor | None  # [D, r]
    bias: Tensor  # [D]
    numerator: Tensor | None  # [m + 1]
    denominator: Tensor | None  # [n]
    down_bias: Tensor | None  # [r]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter in host memory.

    Attributes:
        config: its config.
        tensors: by full on-disk name; float32, on the CPU, finite.
        digest: SHA-256 (hex) over the files that it came from or would be saved as.
        path: the folder it came from, if any.
    """

    config: PedroConfig
    tensors: dict[str, Tensor]
    digest: str
    path: str | None = None

    @functools.cached_property
    def num_layers(self) -> int:
        """Number of decoder layers the adapter is for, up to the last that it scales."""
        matches = (LAYER_NAME.fullmatch(name) for name in self.tensors)
        return 1 + max((int(match[1]) for match in matches if match), default=-1)

    def layer(self, index: int) -> LayerTensors:
        """The tensors of one layer; an empty bias where the adapter scales nothing in it."""
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer {index} of an adapter with {self.num_layers} layers")
        get = self.tensors.get
        return LayerTensors(
            get(tensor_name(index, DOWN)),
            get(tensor_name(index, UP)),
            get(tensor_name(index, BIAS), torch.empty(0)),
            get(tensor_name(index, NUMERATOR)),
            get(tensor_name(index, DENOMINATOR)),
            get(tensor_name(index, DOWN_BIAS)),
        )


class LayerArrays(NamedTuple):
    """The tensors of some consecutive layers as their file has them; see `StoredAdapter`."""

    down: Array | None  # [layers, r, d]
    up: Array | None  # [layers, D, r]
    bias: Array  # [layers, D]
    numerator: Array | None  # [layers, m + 1]
    denominator: Array | None  # [layers, n]
    down_bias: Array | None  # [layers, r]


def widen(values: Array, out: Array) -> None:
    """Write values of a `StoredAdapter` into float32, exactly.

    Args:
        values: float32, float16, or bfloat16 as uint16; of any shape and strides.
        out: float32 of the same shape, its last dimension contiguous. For bfloat16 only the upper
            16 bits are written, so the lower ones must be zero, as they are in zeros and ones.
    """
    if values.dtype == np.uint16:
        out.view("<u2")[..., 1::2] = values
    else:
        out[...] = values


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """A validated adapter in host memory, its values as wide as in its file.

    This is what workers cache: with 16 bits a value it is half as large as an `Adapter`, and it is
    read without any work per tensor.

    Attributes:
        config: its config.
        values: `[n]`, the finite values of all tensors one after the other: float32, float16, or
            bfloat16 as uint16. Files of any other dtype, or of several, are widened to float32.
        digest: SHA-256 (hex) over the files.
        path: the folder it came from.
    """

    config: PedroConfig
    values: Array
    digest: str
    path: str
    _header: Header = field(repr=False)

    @property
    def dtype(self) -> str:
        """What `values` are: "float32", "bfloat16" or "float16"."""
        return "bfloat16" if self.values.dtype == np.uint16 else self.values.dtype.name

    def blocks(self) -> Iterator[tuple[slice, LayerArrays]]:
        """The layers in groups that are evenly spaced in the file.

        Yields:
            A slice of layers, and their tensors as views of `values`; `widen` makes them float32.
        """
        for run in self._header.runs:
            yield (
                slice(run.first, run.first + run.number),
                LayerArrays(
                    self._view(run, DOWN),
                    self._view(run, UP),
                    cast(Array, self._view(run, BIAS)),
                    self._view(run, NUMERATOR),
                    self._view(run, DENOMINATOR),
                    self._view(run, DOWN_BIAS),
                ),
            )

    def _view(self, run: Run, suffix: str) -> Array | None:
        place = run.places.get(suffix)
        if place is None:
            return None
        size = self.values.itemsize
        inside = [size * math.prod(place.shape[i + 1 :]) for i in range(len(place.shape))]
        return np.ndarray(
            (run.number, *place.shape),
            self.values.dtype,
            self.values,
            size * place.begin,
            (size * run.step, *inside),
        )

    def widened(self) -> Adapter:
        """The adapter in float32, tensor by tensor."""
        values = self.values
        if values.dtype != np.float32:
            values = np.zeros(len(values), np.float32)
            widen(self.values, values)
        whole = torch.from_numpy(values)
        tensors = {
            name: whole[place.begin : place.begin + math.prod(place.shape)].view(place.shape)
            for name, place in self._header.places.items()
        }
        return Adapter(self.config, tensors, self.digest, self.path)
