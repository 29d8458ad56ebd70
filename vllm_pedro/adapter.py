"""Adapter folders: from files to validated tensors, and back.

An adapter comes from its tenant, not from the operator, so nothing in it is believed: sizes are
bounded before anything is read, nothing is ever unpickled, every tensor's name, shape, dtype and
values are checked, and each complaint says which file, which tensor, what was expected and what
was found.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, cast

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vllm_pedro.config import (
    CONFIG_NAME,
    BackboneShape,
    PedroConfig,
    open_regular,
    parse_json_object,
    read_config_bytes,
    replace_file,
    shorten,
)
from vllm_pedro.errors import AdapterError, PedroError
from vllm_pedro.generator import VectorGenerator

WEIGHTS_NAME: Final = "adapter_model.safetensors"
TENSOR_PREFIX: Final = "base_model.model.model.layers."

# An adapter of 128 layers has a header of about 100 KiB, and weights of 100 MiB.
MAX_HEADER_BYTES: Final = 16 << 20
MAX_WEIGHTS_BYTES: Final = 16 << 30

PICKLED_NAMES: Final = tuple(f"adapter_model.{ending}" for ending in ("bin", "pt", "pth", "pkl"))

# Read, hashed and looked through so many bytes at a time, which a core keeps close.
CHUNK_BYTES: Final = 1 << 18

# Headers up to this size are remembered once they were parsed. See `_parse_kept`.
MAX_KEPT_HEADER_BYTES: Final = 1 << 18

# safetensors' names of the dtypes an adapter may have, with their sizes in bytes.
FLOAT_DTYPES: Final = {"F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
TORCH_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Array = np.ndarray[Any, np.dtype[Any]]


class _Stored(NamedTuple):
    """How values of a dtype are kept as they are in the file."""

    name: str
    dtype: str  # NumPy's; it has no bfloat16, of which it gets the bits
    unsigned: str  # the bits, read as whole numbers
    signed: str
    infinity: int  # the bits of +inf; those of NaN come after


STORED: Final = {
    "F16": _Stored("float16", "<f2", "<u2", "<i2", 0x7C00),
    "BF16": _Stored("bfloat16", "<u2", "<u2", "<i2", 0x7F80),
    "F32": _Stored("float32", "<f4", "<u4", "<i4", 0x7F800000),
}

_LAYER = re.compile(re.escape(TENSOR_PREFIX) + r"(0|[1-9][0-9]{0,8})\.vector_generator\.(.+)")
_FILE_EXPECTED: Final = "a safetensors file"

DOWN: Final = "down_proj.weight"
UP: Final = "up_proj.weight"
BIAS: Final = "up_proj.bias"
NUMERATOR: Final = "activation.numerator"
DENOMINATOR: Final = "activation.denominator"


def tensor_name(layer: int, suffix: str) -> str:
    """The on-disk name of a tensor, e.g. of layer 0's "down_proj.weight"."""
    return f"{TENSOR_PREFIX}{layer}.vector_generator.{suffix}"


class LayerTensors(NamedTuple):
    """One layer's tensors, as `generate_vectors` takes them; None where the adapter has none."""

    down: Tensor | None  # [r, d]
    up: Tensor | None  # [D, r]
    bias: Tensor  # [D]
    numerator: Tensor | None  # [m + 1]
    denominator: Tensor | None  # [n]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter in host memory.

    Attributes:
        config: its config.
        tensors: by full on-disk name; float32, on the CPU, finite.
        digest: `adapter_digest` of the files it came from or would be saved as.
        path: the folder it came from, if any.
    """

    config: PedroConfig
    tensors: dict[str, Tensor]
    digest: str
    path: str | None = None

    @functools.cached_property
    def num_layers(self) -> int:
        """Number of decoder layers the adapter is for."""
        return sum(name.endswith("." + BIAS) for name in self.tensors)

    def layer(self, index: int) -> LayerTensors:
        """The tensors of one layer."""
        if not 0 <= index < self.num_layers:
            raise IndexError(f"layer {index} of an adapter with {self.num_layers} layers")
        get = self.tensors.get
        return LayerTensors(
            get(tensor_name(index, DOWN)),
            get(tensor_name(index, UP)),
            self.tensors[tensor_name(index, BIAS)],
            get(tensor_name(index, NUMERATOR)),
            get(tensor_name(index, DENOMINATOR)),
        )


class LayerArrays(NamedTuple):
    """The tensors of some consecutive layers as their file has them; see `StoredAdapter`."""

    down: Array | None  # [layers, r, d]
    up: Array | None  # [layers, D, r]
    bias: Array  # [layers, D]
    numerator: Array | None  # [layers, m + 1]
    denominator: Array | None  # [layers, n]


def widen(values: Array, out: Array) -> None:
    """Write values of a `StoredAdapter` into float32, exactly.

    Args:
        values: of any shape and strides.
        out: float32, of the same shape, with a last dimension that is contiguous. It holds zeros,
            ones or what was last written here from values of the same dtype: of a float32 the lower
            half stays as it is where bfloat16 is the upper one.
    """
    if values.dtype == np.uint16:
        out.view("<u2")[..., 1::2] = values
    else:
        out[...] = values


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """A validated adapter in host memory, its values as wide as in its file.

    What workers keep: of an adapter in 16 bits half of what an `Adapter` takes, and no tensor of it
    is touched one by one.

    Attributes:
        config: its config.
        values: all tensors' values one after the other, finite: float32, float16, or the bits of
            bfloat16 as uint16. Files of any other dtype, or of several, are widened to float32.
        digest: `adapter_digest` of the files.
        path: the folder it came from.
    """

    config: PedroConfig
    values: Array
    digest: str
    path: str
    _header: _Header = field(repr=False)

    @property
    def dtype(self) -> str:
        """What `values` are: "float32", "bfloat16" or "float16"."""
        return "bfloat16" if self.values.dtype == np.uint16 else self.values.dtype.name

    def blocks(self) -> Iterator[tuple[slice, LayerArrays]]:
        """The layers, as many at a time as lie evenly in the file: which ones, and their tensors.

        Yields:
            views of `values`, which `widen` makes float32 of.
        """
        for run in self._header.runs:
            yield (
                slice(run.first, run.first + run.number),
                LayerArrays(
                    self._view(run, DOWN),
                    self._view(run, UP),
                    cast(Array, self._view(run, BIAS)),
                    self._view(run, NUMERATOR),
                    self._view(run, DENOMINATOR),
                ),
            )

    def _view(self, run: _Run, suffix: str) -> Array | None:
        place = run.places.get(suffix)
        if place is None:
            return None
        size = self.values.itemsize
        inside = [size * math.prod(place.shape[i + 1 :]) for i in range(len(place.shape))]
        return np.ndarray(
            (run.number, *place.shape),
            self.values.dtype,
            self.values,
            size * place.begin,
            (size * run.step, *inside),
        )

    def widened(self) -> Adapter:
        """The adapter in float32, tensor by tensor."""
        values = self.values
        if values.dtype != np.float32:
            values = np.zeros(len(values), np.float32)
            widen(self.values, values)
        whole = torch.from_numpy(values)
        tensors = {
            name: whole[place.begin : place.begin + math.prod(place.shape)].view(place.shape)
            for name, place in self._header.places.items()
        }
        return Adapter(self.config, tensors, self.digest, self.path)


class _Size(NamedTuple):
    """What the names and shapes of an adapter's tensors depend on, beside the config."""

    num_layers: int
    hidden_size: int
    width: int  # D


def _size(config: PedroConfig, shape: BackboneShape) -> _Size:
    width = sum(shape.split_widths(config.target_modules))
    return _Size(shape.num_layers, shape.hidden_size, width)


def _expected(config: PedroConfig, size: _Size) -> Mapping[str, tuple[int, ...]]:
    config.validate(size.num_layers)
    kinds = config.activation
    return _expected_of(
        config.r, kinds if isinstance(kinds, str) else tuple(kinds), config.rational_order, size
    )


# Kept, because a server's adapters are mostly of a few sizes, and its steps wait for this.
@functools.lru_cache(maxsize=16)
def _expected_of(
    r: int, kinds: str | tuple[str, ...], order: tuple[int, int], size: _Size
) -> Mapping[str, tuple[int, ...]]:
    m, n = order
    result: dict[str, tuple[int, ...]] = {}
    for layer in range(size.num_layers):
        if r > 0:
            result[tensor_name(layer, DOWN)] = (r, size.hidden_size)
            result[tensor_name(layer, UP)] = (size.width, r)
        result[tensor_name(layer, BIAS)] = (size.width,)
        if r > 0 and (kinds if isinstance(kinds, str) else kinds[layer]) == "rational":
            result[tensor_name(layer, NUMERATOR)] = (m + 1,)
            result[tensor_name(layer, DENOMINATOR)] = (n,)
    return result


def expected_tensors(config: PedroConfig, shape: BackboneShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor an adapter with this config has on this backbone.

    Raises:
        PedroError: the config lists activations for another number of layers.
    """
    return dict(_expected(config, _size(config, shape)))


def _infer_size(config: PedroConfig, shapes: Mapping[str, tuple[int, ...]], source: str) -> _Size:
    """The size that the tensors claim, from layer 0; what contradicts it is found later."""
    num_layers = len(_layers_found(shapes))
    if num_layers == 0:
        raise AdapterError(
            f"{source}: expected tensors named {tensor_name(0, BIAS)!r} and so on, "
            f"found {shorten(sorted(shapes)) or 'none'}"
        )
    bias = shapes.get(tensor_name(0, BIAS), ())
    down = shapes.get(tensor_name(0, DOWN), ())
    # A shape of the wrong rank says nothing; 0 never matches, so it will be complained about.
    return _Size(
        num_layers,
        down[1] if len(down) == 2 else 0,
        bias[0] if len(bias) == 1 else 0,
    )


def _layers_found(names: Mapping[str, object]) -> set[int]:
    matches = (_LAYER.fullmatch(name) for name in names)
    return {int(match[1]) for match in matches if match}


def _check_shapes(
    config: PedroConfig,
    shapes: Mapping[str, tuple[int, ...]],
    shape: BackboneShape | None,
    source: str,
) -> None:
    """Compare names and shapes with what the config and the backbone ask for."""
    size = _infer_size(config, shapes, source) if shape is None else _size(config, shape)
    with contextlib.suppress(PedroError):
        if shapes == _expected(config, size):
            return
    # Something is wrong; from here on it is only looked for.
    layers = _layers_found(shapes)
    contiguous = layers == set(range(len(layers)))
    if shape is not None and layers and contiguous and len(layers) != shape.num_layers:
        raise AdapterError(
            f"{source}: expected tensors for the {shape.num_layers} layers of this backbone, "
            f"found {len(layers)} layers: the adapter was made for another backbone, or is "
            "incomplete"
        )
    try:
        expected = _expected(config, size)
    except PedroError as error:
        raise AdapterError(f"{source}: {error}") from None
    missing = [name for name in expected if name not in shapes]
    if missing:
        gap = "" if contiguous else "; layers must be numbered from 0 without a gap"
        raise AdapterError(f"{source}: missing tensors {shorten(missing)}{gap}")
    extra = sorted(name for name in shapes if name not in expected)
    if extra:
        raise AdapterError(
            f"{source}: unexpected tensors {shorten(extra)}; the config asks for r = {config.r}, "
            f"activation {config.activation!r}"
        )
    for name, want in expected.items():
        found = shapes[name]
        if found == want:
            continue
        message = f"{source}: {name}: expected shape {list(want)}"
        if shape is None:
            raise AdapterError(f"{message}, found {list(found)}")
        message += f" for this backbone ({_reason(name, config, shape)}), found {list(found)}"
        if len(found) == len(want) and _differs_by_backbone(name, found, want):
            message += ": the adapter was made for another backbone"
        raise AdapterError(message)


def _reason(name: str, config: PedroConfig, shape: BackboneShape) -> str:
    if name.endswith((NUMERATOR, DENOMINATOR)):
        return f"rational_order {list(config.rational_order)}"
    if name.endswith(DOWN):
        return f"hidden_size {shape.hidden_size}"
    widths = zip(config.target_modules, shape.split_widths(config.target_modules), strict=True)
    return ", ".join(f"{module} {width}" for module, width in widths)


def _differs_by_backbone(name: str, found: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether only the dimension set by the backbone, not the one set by the config, differs."""
    if name.endswith(DOWN):
        return found[0] == want[0]
    if name.endswith(UP):
        return found[1] == want[1]
    return name.endswith(BIAS)


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Place(NamedTuple):
    """Where a tensor's values are: the index of the first among all, and their shape."""

    begin: int
    shape: tuple[int, ...]


class _Run(NamedTuple):
    """Consecutive layers that are equally far from each other in the data."""

    first: int
    number: int
    step: int  # values from one layer to the next
    places: Mapping[str, _Place]  # of the first layer, by the ends of the names


@dataclass(frozen=True, eq=False)
class _Header:
    """A safetensors header whose entries fill the data without gaps; never changed."""

    entries: Mapping[str, _Entry]
    nbytes: int  # of the data

    @functools.cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @functools.cached_property
    def stored(self) -> _Stored | None:
        """How the values can be kept as they are; None where they are widened one by one."""
        dtypes = {entry.dtype for entry in self.entries.values()}
        return STORED.get(dtypes.pop()) if len(dtypes) == 1 else None

    @functools.cached_property
    def places(self) -> Mapping[str, _Place]:
        """In the order of the data."""
        result, begin = {}, 0
        for name, entry in sorted(self.entries.items(), key=_position):
            result[name] = _Place(begin, entry.shape)
            begin += math.prod(entry.shape)
        return result

    @functools.cached_property
    def runs(self) -> list[_Run]:
        """The layers 0, 1, ... in as few runs as it takes, of tensors that are those expected.

        Names are sorted as text, so 10 comes before 2, and thirty layers are five runs.
        """
        layers: dict[int, dict[str, _Place]] = {}
        for name, place in self.places.items():
            if match := _LAYER.fullmatch(name):
                layers.setdefault(int(match[1]), {})[match[2]] = place
        runs: list[_Run] = []
        for layer in range(len(layers)):
            step = _step(runs[-1], layers[layer]) if runs else None
            if step is None:
                runs.append(_Run(layer, 1, 0, layers[layer]))
            else:
                runs[-1] = runs[-1]._replace(number=runs[-1].number + 1, step=step)
        return runs


def _position(item: tuple[str, _Entry]) -> tuple[int, int]:
    return item[1].begin, item[1].end


def _step(run: _Run, layer: Mapping[str, _Place]) -> int | None:
    """How far a run's layers are from each other with this one at its end; None if it ends here."""
    if run.places.keys() != layer.keys():
        return None
    distances = {layer[suffix].begin - place.begin for suffix, place in run.places.items()}
    step, rest = divmod(distances.pop(), run.number)
    if distances or rest or (run.number > 1 and step != run.step):
        return None
    return step


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(name: str, entry: Any, source: str) -> _Entry:
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
    return _Entry(dtype, tuple(shape), begin, end)


def _parse_header(header: bytes, source: str) -> _Header:
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
    return _Header(entries, position)


@functools.lru_cache(maxsize=16)
def _parse_kept(header: bytes) -> _Header:
    """`_parse_header` for tenants' adapters, which mostly have the same header, byte by byte."""
    return _parse_header(header, "")


def _read_header(file: BinaryIO, source: str) -> tuple[bytes, _Header]:
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
        # torch.save writes a zip archive, and wrote a bare pickle before. Asked only here, because
        # a header's length may begin with the same bytes.
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            raise AdapterError(
                f"{source}: expected {_FILE_EXPECTED}, found a pickled PyTorch file: these can run "
                "code and are never loaded; save the adapter again as safetensors"
            )
        raise AdapterError(
            f"{source}: expected {_FILE_EXPECTED}, found {total} bytes that are truncated or of "
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
    if length <= MAX_KEPT_HEADER_BYTES:
        with contextlib.suppress(AdapterError):  # said below, with the file's name
            parsed = _parse_kept(header)
    if parsed is None:
        parsed = _parse_header(header, source)
    if 8 + length + parsed.nbytes != total:
        raise AdapterError(
            f"{source}: expected {8 + length + parsed.nbytes} bytes by its header, found {total}: "
            "the file is truncated, or something was appended"
        )
    return start + header, parsed


def _check_folder(path: str | os.PathLike[str]) -> Path:
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


def _new_hash(config_bytes: bytes, weights_length: int) -> Any:
    # The lengths keep bytes from moving between the two files under the same digest.
    result = hashlib.sha256()
    result.update(len(config_bytes).to_bytes(8, "little"))
    result.update(config_bytes)
    result.update(weights_length.to_bytes(8, "little"))
    return result


def _digest(config_bytes: bytes, weights: bytes) -> str:
    result = _new_hash(config_bytes, len(weights))
    result.update(weights)
    return str(result.hexdigest())


def adapter_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over the adapter's config and weights files: its identity.

    The files are not validated.

    Raises:
        AdapterError: the folder or one of the files is missing, unreadable or too large.
    """
    folder = _check_folder(path)
    config_bytes = read_config_bytes(folder / CONFIG_NAME)
    weights_path = folder / WEIGHTS_NAME
    with open_regular(weights_path, _FILE_EXPECTED) as file:
        total = os.fstat(file.fileno()).st_size
        if total > MAX_WEIGHTS_BYTES:
            raise AdapterError(
                f"{weights_path}: expected at most {MAX_WEIGHTS_BYTES} bytes, found {total} bytes"
            )
        result = _new_hash(config_bytes, total)
        length = 0
        while chunk := file.read(1 << 20):
            length += len(chunk)
            result.update(chunk)
    if length != total:
        raise AdapterError(f"{weights_path}: the file changed while it was read")
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
    folder = _check_folder(path)
    _, config = _read_config(folder)
    source = str(folder / WEIGHTS_NAME)
    with open_regular(source, _FILE_EXPECTED) as file:
        _, header = _read_header(file, source)
    _check_shapes(config, header.shapes, shape, source)
    return config


def load_adapter(
    path: str | os.PathLike[str],
    shape: BackboneShape | None = None,
    expected_digest: str | None = None,
    check: Callable[[PedroConfig], None] | None = None,
) -> Adapter:
    """Read and validate an adapter folder.

    Each file is read once: the bytes that are hashed are the bytes that are parsed.

    Args:
        path: the adapter folder.
        shape: the backbone; None checks only that the adapter agrees with itself.
        expected_digest: the digest the adapter had when it was registered.
        check: called with the config before the weights are opened; raises for an adapter that is
            not wanted, whose weights may be of any size.

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
    """`load_adapter` without making tensors: what a worker does between two steps."""
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
    """`load_adapter` for its errors alone; the weights pass by and are not kept.

    Returns:
        The config, the digest and the `StoredAdapter.dtype` that the adapter would have.
    """
    files = _read_files(path, shape, check, keep=False)
    if files.is_finite and files.header.stored is not None:
        return files.config, files.digest, files.header.stored.name
    # Says which tensor is wrong, or that those of an uncommon dtype are not.
    adapter = read_adapter(path, shape, check=check)
    return adapter.config, adapter.digest, adapter.dtype


class _Files(NamedTuple):
    """An adapter's files, of which everything was checked but the values, if not `is_finite`."""

    folder: Path
    config: PedroConfig
    start: bytes  # of the weights' file, up to the data
    header: _Header
    data: Array  # bytes; all, or the last ones that were read
    digest: str
    is_finite: bool


def _read_files(
    path: str | os.PathLike[str],
    shape: BackboneShape | None,
    check: Callable[[PedroConfig], None] | None,
    keep: bool,
) -> _Files:
    folder = _check_folder(path)
    config_bytes, config = _read_config(folder)
    if check is not None:
        check(config)
    source = str(folder / WEIGHTS_NAME)
    with open_regular(source, _FILE_EXPECTED) as file:
        start, header = _read_header(file, source)
        # Before the data, so that a large file with a wrong header is never read.
        _check_shapes(config, header.shapes, shape, source)
        result = _new_hash(config_bytes, len(start) + header.nbytes)
        result.update(start)
        data = np.empty(header.nbytes if keep else min(header.nbytes, CHUNK_BYTES), np.uint8)
        is_finite, stored = True, header.stored
        for begin in range(0, header.nbytes, CHUNK_BYTES):
            size = min(CHUNK_BYTES, header.nbytes - begin)
            chunk = data[begin : begin + size] if keep else data[:size]
            if file.readinto(chunk) != size:  # type: ignore[attr-defined]
                raise AdapterError(f"{source}: the file changed while it was read")
            result.update(chunk)
            is_finite = is_finite and stored is not None and _is_finite(chunk, stored)
        if file.read(1):
            raise AdapterError(f"{source}: the file changed while it was read")
    return _Files(folder, config, start, header, data, str(result.hexdigest()), is_finite)


def _is_finite(data: Array, stored: _Stored) -> bool:
    """Whether bytes of a dtype hold neither NaN nor Inf.

    Both have all bits of the exponent set, so they are the largest of all, among whole numbers: as
    signed ones if the sign is plus, else as unsigned ones. That takes no copy, and no arithmetic.
    """
    sign = 1 << (8 * np.dtype(stored.unsigned).itemsize - 1)
    return bool(
        data.view(stored.signed).max() < stored.infinity
        and data.view(stored.unsigned).max() < sign + stored.infinity
    )


def _widened_one_by_one(files: _Files) -> Array:
    """All values in float32, of any dtype, by torch, with complaints about single tensors.

    Raises:
        AdapterError: one holds NaN or Inf.
    """
    source = str(files.folder / WEIGHTS_NAME)
    try:
        stored = safetensors.torch.load(files.start + files.data.tobytes())
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise AdapterError(f"{source}: expected {_FILE_EXPECTED}, found {error}") from error
    tensors = [_finite_float32(name, stored[name], source) for name in files.header.places]
    return np.concatenate([tensor.numpy().ravel() for tensor in tensors])


def _finite_float32(name: str, tensor: Tensor, source: str) -> Tensor:
    if tensor.dtype == torch.float64:
        _check_finite(name, tensor, source)
    # Narrower types keep NaN and Inf as they widen, and torch cannot look for them in 8 bits.
    result = tensor.to(torch.float32)
    where = " in float32" if tensor.dtype == torch.float64 else ""
    _check_finite(name, result, source, where)
    return result


def _check_finite(name: str, tensor: Tensor, source: str, where: str = "") -> None:
    if not bool(torch.isfinite(tensor).all()):
        nan = int(torch.isnan(tensor).sum())
        inf = int(torch.isinf(tensor).sum())
        raise AdapterError(
            f"{source}: {name}: expected finite values, found {nan} NaN and {inf} Inf among "
            f"{tensor.numel()}{where}"
        )


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    # Copies, because safetensors refuses tensors that share memory. It sorts them by itself.
    ready = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    return bytes(safetensors.torch.save(ready, metadata={"format": "pt"}))


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
        The digest, as `adapter_digest` gives it.

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
    _check_shapes(config, shapes, None, source)
    ready = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in TORCH_DTYPES:
            raise AdapterError(
                f"{source}: {name}: expected one of {list(TORCH_DTYPES)}, found {tensor.dtype}"
            )
        ready[name] = tensor if dtype is None else tensor.to(dtype)
        _check_finite(name, ready[name], source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise AdapterError(f"{folder}: expected a folder, found a file") from None
    _check_folder(folder)
    config_bytes, weights = config.to_json(), _serialise(ready)
    replace_file(folder / WEIGHTS_NAME, weights)
    replace_file(folder / CONFIG_NAME, config_bytes)
    return _digest(config_bytes, weights)


def init_adapter(
    config: PedroConfig, shape: BackboneShape, seed: int = 0, scale: float | None = None
) -> Adapter:
    """A fresh adapter, which leaves the backbone as it is, or a random one.

    Args:
        config: its config.
        shape: the backbone.
        seed: of the random numbers; the same seed gives the same adapter.
        scale: None for a fresh adapter. Otherwise W_up ~ N(0, scale^2) and
            b_up ~ N(1, scale^2), so that every vector differs from one: for tests and demos.

    Returns:
        The adapter, with the digest it gets when it is saved in float32.
    """
    config.validate(shape.num_layers)
    random = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for layer in range(shape.num_layers):
        generator = VectorGenerator(config, shape, layer, random)
        for suffix, tensor in generator.state_dict().items():
            if scale is not None and suffix in (UP, BIAS):
                tensor += torch.randn(tensor.shape, generator=random) * scale
            tensors[tensor_name(layer, suffix)] = tensor
    return Adapter(config, tensors, _digest(config.to_json(), _serialise(tensors)))
