"""Adapter folders: from files to validated tensors, and back.

An adapter comes from a tenant and is not trusted: sizes are bounded before anything is read,
nothing is ever unpickled, and every tensor's name, shape, dtype and values are checked. Each error
names the file, the tensor, what was expected and what was found.

One verb for each use:

- `load_adapter`: an `Adapter` of float32 tensors, for training and tools.
- `read_adapter`: a `StoredAdapter`, as wide as its file, for workers.
- `verify_adapter`: the same checks and the digest, without keeping the weights, for front ends.
- `inspect_adapter`: the config and the header of the weights alone, before anything is started.
- `fetch_adapter`: a repository of the hub into huggingface_hub's cache; the folder there.
"""

from __future__ import annotations

from .hub import Repository, fetch_adapter, fetch_config, may_be_repository, repository_of
from .names import WEIGHTS_NAME, Array, tensor_name
from .reading import (
    inspect_adapter,
    load_adapter,
    read_adapter,
    verify_adapter,
)
from .values import Adapter, LayerTensors, StoredAdapter
from .writing import init_adapter, save_adapter

__all__ = [
    "WEIGHTS_NAME",
    "Adapter",
    "Array",
    "LayerTensors",
    "Repository",
    "StoredAdapter",
    "fetch_adapter",
    "fetch_config",
    "init_adapter",
    "inspect_adapter",
    "load_adapter",
    "may_be_repository",
    "read_adapter",
    "repository_of",
    "save_adapter",
    "tensor_name",
    "verify_adapter",
]
