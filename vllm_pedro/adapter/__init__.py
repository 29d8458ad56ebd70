"""Adapter folders: from files to validated tensors, and back.

An adapter comes from its tenant, not from the operator, so nothing in it is believed: sizes are
bounded before anything is read, nothing is ever unpickled, every tensor's name, shape, dtype and
values are checked, and each complaint says which file, which tensor, what was expected and what
was found.
"""

from __future__ import annotations

from .names import WEIGHTS_NAME, Array, tensor_name
from .reading import (
    adapter_digest,
    inspect_adapter,
    load_adapter,
    read_adapter,
    verify_adapter,
)
from .shapes import expected_tensors
from .values import Adapter, LayerTensors, StoredAdapter, widen
from .writing import init_adapter, save_adapter

__all__ = [
    "WEIGHTS_NAME",
    "Adapter",
    "Array",
    "LayerTensors",
    "StoredAdapter",
    "adapter_digest",
    "expected_tensors",
    "init_adapter",
    "inspect_adapter",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "tensor_name",
    "verify_adapter",
    "widen",
]
