"""From a folder to a validated adapter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..backbone import BackboneShape
from ..config import CONFIG_NAME, PedroConfig, read_config_bytes
from ..errors import AdapterError
from ..files import open_regular, parse_json_object
from .header import Header, Stored, read_header
from .names import FILE_EXPECTED, PICKLED_NAMES, WEIGHTS_NAME, Array
from .shapes import check_shapes
from .values import Adapter, StoredAdapter

CHUNK_BYTES: Final = 1 << 18
"""Weights are read, hashed and checked in pieces of this size, which fits a core's cache."""


def check_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, if there is one and it holds no pickled weights.

    Raises:
        AdapterError: there is no folder, or a pickled file is in it.
    """
    text = os.fspath(path)
    try:
        is_folder = bool(text) and os.path.isdir(text)
        exists = is_folder or os.path.exists(text)
    except ValueError:  # a null byte in the path
        is_folder = exists = False
    if not is_folder:
        found = "something that is not a folder" if exists else "nothing"
        raise AdapterError(
            f"{text!r}: expected an adapter folder with {CONFIG_NAME} and {WEIGHTS_NAME}, "
            f"found {found}"
        )
    folder = Path(text)
    pickled = [name for name in PICKLED_NAMES if os.path.lexists(folder / name)]
    if pickled:
        beside = "beside" if os.path.lexists(folder / WEIGHTS_NAME) else "instead of"
        raise AdapterError(
            f"{folder}: found {pickled[0]} {beside} {WEIGHTS_NAME}: pickled files can run code "
            "and are never loaded; keep only the safetensors file"
        )
    return folder


def new_hash(config_bytes: bytes, weights_length: int) -> Any:
    """A SHA-256 that has read the config and now takes the bytes of the weights' file.

    The lengths are hashed too, so that no bytes can move from one file to the other.
    """
    result = hashlib.sha256()
    result.update(len(config_bytes).to_bytes(8, "little"))
    result.update(config_bytes)
    result.update(weights_length.to_bytes(8, "little"))
    return result


def digest_of(config_bytes: bytes, weights: bytes) -> str:
    """An adapter's identity: SHA-256 (hex) over the bytes of its two files and their lengths."""
    result = new_hash(config_bytes, len(weights))
    result.update(weights)
    return str(result.hexdigest())


def _read_config(folder: Path) -> tuple[bytes, PedroConfig]:
    source = str(folder / CONFIG_NAME)
    data = read_config_bytes(source)
    return data, PedroConfig.from_dict(parse_json_object(data, source), source)


def inspect_adapter(
    path: str | os.PathLike[str], shape: BackboneShape | None = None
) -> PedroConfig:
    """Check an adapter's config and the header of its weights, without reading the weights.

    Finds everything that `load_adapter` finds except NaN, Inf and changed values.

    Args:
        path: the adapter folder.
        shape: the backbone; None checks only that the adapter agrees with itself.

    Raises:
        AdapterError: see `load_adapter`.
    """
    folder = check_folder(path)
    _, config = _read_config(folder)
    source = str(folder / WEIGHTS_NAME)
    with open_regular(source, FILE_EXPECTED) as file:
        _, header = read_header(file, source)
    check_shapes(config, header.shapes, shape, source)
    return config


def load_adapter(
    path: str | os.PathLike[str],
    shape: BackboneShape | None = None,
    expected_digest: str | None = None,
    check: Callable[[PedroConfig], None] | None = None,
) -> Adapter:
    """Read and validate an adapter folder.

    Each file is read once, so the digest is that of the very bytes that are parsed.

    Args:
        path: the adapter folder.
        shape: the backbone; None checks only that the adapter agrees with itself.
        expected_digest: the digest the adapter had when it was registered.
        check: called with the config before the weights are opened; raises for an adapter that is
            not wanted, before its weights, which may be large, are read.

    Returns:
        The adapter, its tensors in float32 on the CPU.

    Raises:
        AdapterError: a file is missing, pickled, truncated or not what its name says; the config
            is not valid; tensors are missing, unexpected, of the wrong shape, not of a float
            dtype, or hold NaN or Inf; the adapter does not fit `shape`; or the files are not the
            ones that `expected_digest` was made from.
    """
    return read_adapter(path, shape, expected_digest, check).widened()


def read_adapter(
    path: str | os.PathLike[str],
    shape: BackboneShape | None = None,
    expected_digest: str | None = None,
    check: Callable[[PedroConfig], None] | None = None,
) -> StoredAdapter:
    """`load_adapter` without widening or splitting the values, which a worker has no time for.

    Args:
        path: see `load_adapter`, as for the other arguments and the errors.
        shape: see `load_adapter`.
        expected_digest: see `load_adapter`.
        check: see `load_adapter`.

    Returns:
        The adapter, its values in the dtype of its file.
    """
    files = _read_files(path, shape, check, keep=True)
    if expected_digest is not None and files.digest != expected_digest:
        raise AdapterError(
            f"{files.folder}: the files changed since the adapter was registered: expected digest "
            f"{expected_digest}, found {files.digest}; register it again"
        )
    if files.is_finite and files.header.stored is not None:
        values = files.data.view(files.header.stored.dtype)
    else:
        values = _widened_one_by_one(files)
    return StoredAdapter(files.config, values, files.digest, str(files.folder), files.header)


def verify_adapter(
    path: str | os.PathLike[str],
    shape: BackboneShape | None = None,
    check: Callable[[PedroConfig], None] | None = None,
) -> tuple[PedroConfig, str, str]:
    """Find every error that `load_adapter` finds, in the memory of `CHUNK_BYTES`.

    Returns:
        The config, the digest and the `StoredAdapter.dtype` that the adapter would have.
    """
    files = _read_files(path, shape, check, keep=False)
    if files.is_finite and files.header.stored is not None:
        return files.config, files.digest, files.header.stored.name
    # Read whole: to name the tensor that is not finite, or to check a dtype that is widened first.
    adapter = read_adapter(path, shape, check=check)
    return adapter.config, adapter.digest, adapter.dtype


class _Files(NamedTuple):
    """An adapter's files, checked; but if not `is_finite`, the values are still to be checked."""

    folder: Path
    config: PedroConfig
    start: bytes  # of the weights' file, up to the data
    header: Header
    data: Array  # bytes; all, or the last ones that were read
    digest: str
    is_finite: bool


def _read_files(
    path: str | os.PathLike[str],
    shape: BackboneShape | None,
    check: Callable[[PedroConfig], None] | None,
    keep: bool,
) -> _Files:
    folder = check_folder(path)
    config_bytes, config = _read_config(folder)
    if check is not None:
        check(config)
    source = str(folder / WEIGHTS_NAME)
    with open_regular(source, FILE_EXPECTED) as file:
        start, header = read_header(file, source)
        # Before the data, so that a large file with a wrong header is never read.
        check_shapes(config, header.shapes, shape, source)
        result = new_hash(config_bytes, len(start) + header.nbytes)
        result.update(start)
        data = np.empty(header.nbytes if keep else min(header.nbytes, CHUNK_BYTES), np.uint8)
        is_finite, stored = True, header.stored
        for begin in range(0, header.nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, header.nbytes - begin)
            chunk = data[begin : begin + size] if keep else data[:size]
            if file.readinto(chunk) != size:  # type: ignore[attr-defined]
                raise AdapterError(f"{source}: the file changed while it was read")
            result.update(chunk)
            is_finite = is_finite and stored is not None and is_finite_bits(chunk, stored)
        if file.read(1):
            raise AdapterError(f"{source}: the file changed while it was read")
    return _Files(folder, config, start, header, data, str(result.hexdigest()), is_finite)


def is_finite_bits(data: Array, stored: Stored) -> bool:
    """Whether bytes of a dtype hold neither NaN nor Inf.

    NaN and Inf have all bits of the exponent set, so read as integers they are the largest:
    positive ones among signed integers, negative ones among unsigned. Comparing copies nothing.
    """
    sign = 1 << (8 * np.dtype(stored.unsigned).itemsize - 1)
    return bool(
        data.view(stored.signed).max() < stored.infinity
        and data.view(stored.unsigned).max() < sign + stored.infinity
    )


def _widened_one_by_one(files: _Files) -> Array:
    """All values in float32, from any dtype, tensor by tensor.

    Raises:
        AdapterError: names the tensor that holds NaN or Inf.
    """
    source = str(files.folder / WEIGHTS_NAME)
    try:
        stored = safetensors.torch.load(files.start + files.data.tobytes())
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{source}: expected {FILE_EXPECTED}, found {error}") from error
    tensors = [_finite_float32(name, stored[name], source) for name in files.header.places]
    return np.concatenate([tensor.numpy().ravel() for tensor in tensors])


def _finite_float32(name: str, tensor: Tensor, source: str) -> Tensor:
    if tensor.dtype == torch.float64:
        check_finite(name, tensor, source)
    # Narrower types keep NaN and Inf as they widen, and torch cannot look for them in 8 bits.
    result = tensor.to(torch.float32)
    where = " in float32" if tensor.dtype == torch.float64 else ""
    check_finite(name, result, source, where)
    return result


def check_finite(name: str, tensor: Tensor, source: str, where: str = "") -> None:
    """Refuse NaN and Inf.

    Raises:
        AdapterError: names the file and the tensor, with the counts of both.
    """
    if not bool(torch.isfinite(tensor).all()):
        nan = int(torch.isnan(tensor).sum())
        inf = int(torch.isinf(tensor).sum())
        raise AdapterError(
            f"{source}: {name}: expected finite values, found {nan} NaN and {inf} Inf among "
            f"{tensor.numel()}{where}"
        )
