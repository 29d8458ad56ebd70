"""Adapters that are handed over as tensors: folders in memory, which all of an engine's processes
read like those on a disk, so that nothing else has to know of them.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
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

_PREFIX: Final = "vllm-pedro-tensors-"
"""Of a process's own directory, which it holds locked as long as it lives."""

_places: dict[tuple[str, int], str] = {}  # by where it is, and the process

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
        folder = tempfile.mkdtemp(dir=_own_place(place))
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


def _own_place(place: str) -> str:
    """This process's directory; what processes left there that were killed is removed."""
    key = place, os.getpid()
    while key not in _places:
        for name in os.listdir(place):
            if name.startswith(_PREFIX):
                _release_abandoned(os.path.join(place, name))
        own = tempfile.mkdtemp(prefix=_PREFIX, dir=place)
        if _lock(own):
            _places[key] = own
            atexit.register(_release_here, own, os.getpid())
    return _places[key]


def _lock(directory: str) -> bool:
    """Lock a new directory until this process ends, killed or not; whether it is still there."""
    try:
        handle = os.open(directory, os.O_RDONLY)
        with contextlib.suppress(OSError):  # without locks nobody takes it for abandoned
            fcntl.flock(handle, fcntl.LOCK_EX)
        return os.path.samestat(os.fstat(handle), os.stat(directory))
    except FileNotFoundError:  # taken for abandoned before it was locked
        return False


def _release_abandoned(directory: str) -> None:
    with contextlib.suppress(OSError):  # locked, gone, or another user's
        handle = os.open(directory, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            release(directory)
        finally:
            os.close(handle)
