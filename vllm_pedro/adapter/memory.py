"""Adapters that are handed over as tensors: folders in memory, which all of an engine's processes
read like those on a disk, so that nothing else has to know of them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ..config import CONFIG_NAME, PedroConfig
from ..errors import AdapterError, PedroError
from ..files import parse_json_object
from .header import MAX_HEADER_BYTES
from .names import FILE_EXPECTED, WEIGHTS_NAME
from .writing import save_adapter, serialise

SHARED_MEMORY: Final = "/dev/shm"
"""Where it is there and has room; else the directory of temporary files."""

CONFIG_KEY: Final = "adapter_config"
"""Key of a safetensors file's metadata with the JSON of the adapter's config."""


def hold_tensors(
    config: PedroConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> str:
    """A new folder with an adapter; `release_with` says until when.

    Raises:
        PedroError: See `save_adapter`; or there is no room.
    """
    return _hold(lambda folder: save_adapter(folder, config, tensors, dtype))


def to_bytes(config: PedroConfig, tensors: Mapping[str, Tensor]) -> bytes:
    """An adapter as one safetensors file, with its config in the metadata, to be sent."""
    return serialise(tensors, {CONFIG_KEY: config.to_json().decode()})


def hold_bytes(data: bytes | bytearray, source: str) -> str:
    """`hold_tensors` with what `to_bytes` gives; no more is checked than that it has a config.

    Raises:
        AdapterError: It has none.
        PedroError: There is no room.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise AdapterError(f"{source}: expected {FILE_EXPECTED}, found {len(data)} other bytes")
    header = parse_json_object(bytes(data[8 : 8 + length]), f"{source}: safetensors header")
    metadata = header.get("__metadata__")
    config = metadata.get(CONFIG_KEY) if isinstance(metadata, dict) else None
    if not isinstance(config, str):
        raise AdapterError(
            f"{source}: the safetensors metadata has no {CONFIG_KEY!r} with the JSON of the "
            "adapter's config"
        )
    try:
        config_bytes = config.encode()
    except UnicodeEncodeError as error:
        raise AdapterError(f"{source}: {CONFIG_KEY}: {error}") from None

    def write(folder: str) -> None:
        Path(folder, CONFIG_NAME).write_bytes(config_bytes)
        Path(folder, WEIGHTS_NAME).write_bytes(data)

    return _hold(write)


def release(folder: str) -> None:
    """Free the memory of a folder."""
    shutil.rmtree(folder, ignore_errors=True)


def release_with(owner: object, folder: str) -> None:
    """Free the memory of a folder when its owner is gone, or this process ends."""
    weakref.finalize(owner, _release_here, folder, os.getpid())


def _release_here(folder: str, pid: int) -> None:
    if os.getpid() == pid:  # not a forked process, which has the owner too
        release(folder)


def _hold(write: Callable[[str], object]) -> str:
    for place in (SHARED_MEMORY, tempfile.gettempdir()):
        if not os.access(place, os.W_OK):
            continue
        folder = tempfile.mkdtemp(prefix="vllm-pedro-", dir=place)
        try:
            write(folder)
        except OSError as error:
            release(folder)
            reason = error
        except BaseException:
            release(folder)
            raise
        else:
            return folder
    raise PedroError(f"no room for the adapter in {SHARED_MEMORY} or {place}: {reason}")
