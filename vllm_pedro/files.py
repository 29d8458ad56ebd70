"""Files: opening and parsing what others wrote, replacing whole what others read."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from .errors import AdapterError


def open_regular(path: str | os.PathLike[str], expected: str) -> BinaryIO:
    """Open `path` for reading if it is a regular file.

    Raises:
        AdapterError: the file is missing, unreadable or not a regular file; `expected` says in
            the message what should have been there.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO would hang until somebody writes to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise AdapterError(f"{path}: expected {expected}, found no such file") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: expected {expected}, found {error}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        found = "a folder" if os.path.isdir(path) else "something that is not a regular file"
        raise AdapterError(f"{path}: expected {expected}, found {found}")
    return os.fdopen(handle, "rb")


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """Parse `data` as one JSON object, refusing what JSON parsers let pass silently.

    Raises:
        AdapterError: not UTF-8, not JSON, not an object, a key given twice, or NaN/Infinity.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise AdapterError(f"{source}: duplicate keys {shorten(twice)}")
        return result

    def constant(name: str) -> Any:
        raise AdapterError(f"{source}: {name} is not JSON")

    try:
        result = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except AdapterError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{source}: expected a JSON object, found invalid JSON: {error}") from (
            error
        )
    if not isinstance(result, dict):
        raise AdapterError(
            f"{source}: expected a JSON object, found a value of type {type(result).__name__}"
        )
    return result


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers see the old bytes or the new, never a part.

    Raises:
        OSError: it cannot be written; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def shorten(names: Sequence[object], limit: int = 5) -> str:
    """`names` for a message: quoted, and counted past the first `limit`."""
    text = ", ".join(repr(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an int and not a bool, which Python counts among the ints."""
    return isinstance(value, int) and not isinstance(value, bool)
