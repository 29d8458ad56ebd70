"""Operators used on the serving path."""

from .scale import scale_, scaled
from .vectors import bind_layer, prefill_vectors, unbind_layers

__all__ = ["bind_layer", "prefill_vectors", "scale_", "scaled", "unbind_layers"]
