"""A safetensors header, checked before anything after it is read."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NamedTuple

from ..errors import AdapterError
from ..files import is_int, parse_json_object
from .names import FILE_EXPECTED, LAYER_NAME

MAX_HEADER_BYTES: Final = 16 << 20
"""Longest header that is read; an adapter of 128 layers has one of about 100 KiB."""

MAX_WEIGHTS_BYTES: Final = 16 << 30
"""Largest file that is read; an adapter of 128 layers has about 100 MiB."""

MAX_CACHED_HEADER_BYTES: Final = 1 << 18
"""Headers up to this size are cached once they were parsed; see `_parse_cached`."""

FLOAT_DTYPES: Final = {"F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""Size in bytes of the dtypes an adapter may have, by safetensors' names."""


class Stored(NamedTuple):
    """How values of a dtype are held in memory without conversion.

    Attributes:
        name: torch's name of the dtype.
        dtype: NumPy's; uint16 for bfloat16, which NumPy lacks.
        unsigned: NumPy's unsigned integer of this size.
        signed: the signed one.
        infinity: the bits of +inf; those of positive NaNs are larger integers.
    """

    name: str
    dtype: str
    unsigned: str
    signed: str
    infinity: int


STORED: Final = {
    "F16": Stored("float16", "<f2", "<u2", "<i2", 0x7C00),
    "BF16": Stored("bfloat16", "<u2", "<u2", "<i2", 0x7F80),
    "F32": Stored("float32", "<f4", "<u4", "<i4", 0x7F800000),
}


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Place(NamedTuple):
    """A tensor's place: the index of its first value among all values, and its shape."""

    begin: int
    shape: tuple[int, ...]


class Run(NamedTuple):
    """Consecutive layers of the same shapes that are evenly spaced in the data."""

    first: int
    number: int
    step: int  # values from one layer to the next
    places: Mapping[str, Place]  # of the first layer, by the ends of the names


@dataclass(frozen=True, eq=False)
class Header:
    """A safetensors header whose entries fill the data without gaps; never changed."""

    entries: Mapping[str, Entry]
    nbytes: int  # of the data

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @functools.cached_property
    def stored(self) -> Stored | None:
        """How to hold the values without conversion; None if they must be widened to float32."""
        dtypes = {entry.dtype for entry in self.entries.values()}
        return STORED.get(dtypes.pop()) if len(dtypes) == 1 else None

    @functools.cached_property
    def places(self) -> Mapping[str, Place]:
        """Place of each tensor by its name, in the order of the data."""
        result, begin = {}, 0
        for name, entry in sorted(self.entries.items(), key=_position):
            result[name] = Place(begin, entry.shape)
            begin += math.prod(entry.shape)
        return result

    @functools.cached_property
    def runs(self) -> list[Run]:
        """The layers that have tensors, in as few runs as possible, after `check_shapes`.

        safetensors sorts names as text, 10 before 2, so thirty layers are five runs.
        """
        layers: dict[int, dict[str, Place]] = {}
        for name, place in self.places.items():
            if match := LAYER_NAME.fullmatch(name):
                layers.setdefault(int(match[1]), {})[match[2]] = place
        runs: list[Run] = []
        for layer in sorted(layers):
            follows = runs and layer == runs[-1].first + runs[-1].number
            step = _step(runs[-1], layers[layer]) if follows else None
            if step is None:
                runs.append(Run(layer, 1, 0, layers[layer]))
            else:
                runs[-1] = runs[-1]._replace(number=runs[-1].number + 1, step=step)
        return runs


def _position(item: tuple[str, Entry]) -> tuple[int, int]:
    return item[1].begin, item[1].end


def _step(run: Run, layer: Mapping[str, Place]) -> int | None:
    """The distance between a run's layers if this layer extends it; None if it does not."""
    if run.places.keys() != layer.keys():
        return None
    if any(layer[suffix].shape != place.shape for suffix, place in run.places.items()):
        return None
    distances = {layer[suffix].begin - place.begin for suffix, place in run.places.items()}
    step, rest = divmod(distances.pop(), run.number)
    if distances or rest or (run.number > 1 and step != run.step):
        return None
    return step


def _is_count(value: object) -> bool:
    return is_int(value) and value >= 0


def _parse_entry(name: str, entry: Any, source: str) -> Entry:
    def fail(found: str) -> AdapterError:
        return AdapterError(f"{source}: broken safetensors header at {name!r}: {found}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"expected dtype, shape and data_offsets, found {str(entry)[:100]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        raise AdapterError(
            f"{source}: {name}: expected a dtype of {list(FLOAT_DTYPES)}, found {str(dtype)[:40]!r}"
        )
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_count, shape)):
        raise fail(f"shape {str(shape)[:100]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise fail(f"data_offsets {str(offsets)[:100]}")
    begin, end = offsets
    if end - begin != math.prod(shape) * FLOAT_DTYPES[dtype]:
        raise fail(f"shape {shape} of {dtype} does not fill the bytes {begin} to {end}")
    return Entry(dtype, tuple(shape), begin, end)


def _parse_header(header: bytes, source: str) -> Header:
    values = parse_json_object(header, f"{source}: safetensors header")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(f"{source}: broken safetensors header: __metadata__ is not text")
    entries = {name: _parse_entry(name, entry, source) for name, entry in values.items()}
    position = 0
    for name, entry in sorted(entries.items(), key=_position):
        if entry.begin != position:
            raise AdapterError(
                f"{source}: broken safetensors header: the data of {name!r} begin at byte "
                f"{entry.begin}, expected {position}"
            )
        position = entry.end
    return Header(entries, position)


@functools.lru_cache(maxsize=16)
def _parse_cached(header: bytes) -> Header:
    """`_parse_header`, cached: most tenants' adapters have identical headers."""
    return _parse_header(header, "")


def read_header(file: BinaryIO, source: str) -> tuple[bytes, Header]:
    """Read and check a safetensors header; leaves `file` at the first byte of data.

    Returns:
        the bytes read, and what they say.
    """
    total = os.fstat(file.fileno()).st_size
    if total > MAX_WEIGHTS_BYTES:
        raise AdapterError(
            f"{source}: expected at most {MAX_WEIGHTS_BYTES} bytes, found {total} bytes"
        )
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > total - 8:
        # torch.save writes a zip archive, formerly a bare pickle. This is checked after the length,
        # because a valid length can begin with the same bytes.
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            raise AdapterError(
                f"{source}: expected {FILE_EXPECTED}, found a pickled PyTorch file: these can run "
                "code and are never loaded; save the adapter again as safetensors"
            )
        raise AdapterError(
            f"{source}: expected {FILE_EXPECTED}, found {total} bytes that are truncated or of "
            "another format"
        )
    if length > MAX_HEADER_BYTES:
        raise AdapterError(
            f"{source}: expected a safetensors header of at most {MAX_HEADER_BYTES} bytes, "
            f"found one of {length}"
        )
    header = file.read(length)
    if len(header) != length:
        raise AdapterError(f"{source}: the file changed while it was read")
    parsed = None
    if length <= MAX_CACHED_HEADER_BYTES:
        with contextlib.suppress(AdapterError):  # raised below, with the file's name
            parsed = _parse_cached(header)
    if parsed is None:
        parsed = _parse_header(header, source)
    if 8 + length + parsed.nbytes != total:
        raise AdapterError(
            f"{source}: expected {8 + length + parsed.nbytes} bytes by its header, found {total}: "
            "the file is truncated, or something was appended"
        )
    return start + header, parsed
