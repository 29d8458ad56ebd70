"""From tensors to a folder; fresh adapters."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..backbone import BackboneShape
from ..config import CONFIG_NAME, PedroConfig
from ..errors import AdapterError, PedroError
from ..files import replace_file
from ..generator import VectorGenerator
from .names import BIAS, DOWN_BIAS, TORCH_DTYPES, UP, WEIGHTS_NAME, tensor_name
from .reading import check_finite, check_folder, digest_of
from .shapes import check_shapes
from .values import Adapter


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file; the same tensors always give the same bytes."""
    # Copies, because safetensors refuses tensors that share memory. It sorts them by itself.
    ready = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    return bytes(safetensors.torch.save(ready, metadata={"format": "pt", **(metadata or {})}))


def save_adapter(
    path: str | os.PathLike[str],
    config: PedroConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> str:
    """Write an adapter folder; the same adapter always gives the same bytes.

    Everything is checked before anything is written, and each file is replaced whole. The folder
    is made if needed. A reader that comes between the two files finds a digest, or shapes, that
    do not match, never a part of a file.

    Args:
        path: the adapter folder.
        config: its config.
        tensors: by full on-disk name, of float dtypes.
        dtype: the dtype to store; None keeps each tensor's own.

    Returns:
        The digest, SHA-256 (hex) over both files.

    Raises:
        PedroError: the config is not valid, or `dtype` is not float16, bfloat16, float32 or
            float64.
        AdapterError: the tensors do not fit the config, are not of a float dtype, or hold NaN or
            Inf once cast; or `path` is a file, or holds a pickled adapter.
    """
    folder = Path(path)
    source = str(folder / WEIGHTS_NAME)
    if dtype is not None and dtype not in TORCH_DTYPES:
        raise PedroError(f"dtype: expected one of {list(TORCH_DTYPES)}, found {dtype}")
    config.validate()
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(config, shapes, None, source)
    ready = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in TORCH_DTYPES:
            raise AdapterError(
                f"{source}: {name}: expected one of {list(TORCH_DTYPES)}, found {tensor.dtype}"
            )
        ready[name] = tensor if dtype is None else tensor.to(dtype)
        check_finite(name, ready[name], source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise AdapterError(f"{folder}: expected a folder, found a file") from None
    check_folder(folder)
    config_bytes, weights = config.to_json(), serialise(ready)
    replace_file(folder / WEIGHTS_NAME, weights)
    replace_file(folder / CONFIG_NAME, config_bytes)
    return digest_of(config_bytes, weights)


def init_adapter(
    config: PedroConfig, shape: BackboneShape, seed: int = 0, scale: float | None = None
) -> Adapter:
    """A fresh adapter, which leaves the backbone as it is, or a random one.

    Args:
        config: its config.
        shape: the backbone.
        seed: of the random numbers; the same seed gives the same adapter.
        scale: None for a fresh adapter. Otherwise W_up ~ N(0, scale^2) and
            b_up ~ N(1, scale^2), so that every vector differs from one: for tests and demos; and
            b_down ~ N(0, 1), if there is one.

    Returns:
        The adapter, with the digest it gets when it is saved in float32.
    """
    config.validate(shape.num_layers)
    shape.check_modules(config.target_modules)
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(shape.num_layers):
        if not sum(shape.split_widths(config.target_modules, layer)):
            continue
        generator = VectorGenerator(config, shape, layer, random)
        for suffix, tensor in generator.tensors().items():
            if scale is not None and suffix in (UP, BIAS, DOWN_BIAS):
                by = 1.0 if suffix == DOWN_BIAS else scale
                tensor += torch.randn(tensor.shape, generator=random) * by
            tensors[tensor_name(layer, suffix)] = tensor
    return Adapter(config, tensors, digest_of(config.to_json(), serialise(tensors)))
