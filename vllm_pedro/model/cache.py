"""Vectors that ride on a KV cache, so that whatever reorders it does the same to them."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor


@dataclass
class PromptVectors:
    """The vectors of a batch of sequences, made when their prompts were read.

    Attributes:
        adapter: name of the adapter that made them.
        layers: by layer index and target module, `[B, d_t]`.
    """

    adapter: str
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def select(self, rows: Tensor) -> PromptVectors:
        """The vectors of these rows, `[B']`, in this order."""
        return self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat_interleave(self, repeats: int) -> PromptVectors:
        """Every row `repeats` times in succession."""
        return self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _map(self, function: Any) -> PromptVectors:
        layers = {
            index: {name: function(tensor) for name, tensor in vectors.items()}
            for index, vectors in self.layers.items()
        }
        return PromptVectors(self.adapter, layers)


class CarriesVectors:
    """Mixed into the class of a KV cache: its rows and the vectors' rows stay the same ones."""

    pedro_vectors: PromptVectors

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]  # a mixin: Cache has it
        self.pedro_vectors = self.pedro_vectors.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]  # a mixin: Cache has it
        self.pedro_vectors = self.pedro_vectors.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]  # a mixin: Cache has it
        self.pedro_vectors = self.pedro_vectors.repeat_interleave(repeats)


@functools.cache
def _carrier_class(cache_class: Any) -> type:
    return type(f"Pedro{cache_class.__name__}", (CarriesVectors, cache_class), {})


def attach_vectors(cache: Any, vectors: PromptVectors) -> None:
    """Let `cache` carry `vectors`.

    Its class is changed in place, because the object is often the caller's, and because methods
    replaced on the object would still be bound to it in a deep copy.
    """
    if not isinstance(cache, CarriesVectors):
        cache.__class__ = _carrier_class(cast(Hashable, type(cache)))
    cache.pedro_vectors = vectors
