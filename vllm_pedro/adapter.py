"""Adapter folders: from files to validated tensors, and back.

An adapter comes from its tenant, not from the operator, so nothing in it is believed: sizes are
bounded before anything is read, nothing is ever unpickled, every tensor's name, shape, dtype and
values are checked, and each complaint says which file, which tensor, what was expected and what
was found.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

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

# safetensors' names of the dtypes an adapter may have, with their sizes in bytes.
FLOAT_DTYPES: Final = {"F8_E4M3": 1, "F8_E5M2": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
TORCH_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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


class _Size(NamedTuple):
    """What the names and shapes of an adapter's tensors depend on, beside the config."""

    num_layers: int
    hidden_size: int
    width: int  # D


def _size(config: PedroConfig, shape: BackboneShape) -> _Size:
    width = sum(shape.split_widths(config.target_modules))
    return _Size(shape.num_layers, shape.hidden_size, width)


def _expected(config: PedroConfig, size: _Size) -> dict[str, tuple[int, ...]]:
    config.validate(size.num_layers)
    m, n = config.rational_order
    result: dict[str, tuple[int, ...]] = {}
    for layer in range(size.num_layers):
        if config.r > 0:
            result[tensor_name(layer, DOWN)] = (config.r, size.hidden_size)
            result[tensor_name(layer, UP)] = (size.width, config.r)
        result[tensor_name(layer, BIAS)] = (size.width,)
        if config.r > 0 and config.activation_of(layer) == "rational":
            result[tensor_name(layer, NUMERATOR)] = (m + 1,)
            result[tensor_name(layer, DENOMINATOR)] = (n,)
    return result


def expected_tensors(config: PedroConfig, shape: BackboneShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor an adapter with this config has on this backbone.

    Raises:
        PedroError: the config lists activations for another number of layers.
    """
    return _expected(config, _size(config, shape))


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


def _read_header(file: BinaryIO, source: str) -> tuple[bytes, dict[str, _Entry]]:
    """Read and check a safetensors header; leaves `file` at the first byte of data.

    Returns:
        the bytes read, and the tensors' entries by name.
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
    values = parse_json_object(header, f"{source}: safetensors header")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterError(f"{source}: broken safetensors header: __metadata__ is not text")
    entries = {name: _parse_entry(name, entry, source) for name, entry in values.items()}

    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise AdapterError(
                f"{source}: broken safetensors header: the data of {name!r} begin at byte "
                f"{entry.begin}, expected {position}"
            )
        position = entry.end
    if 8 + length + position != total:
        raise AdapterError(
            f"{source}: expected {8 + length + position} bytes by its header, found {total}: the "
            "file is truncated, or something was appended"
        )
    return start + header, entries


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
        _, entries = _read_header(file, source)
    _check_shapes(config, {name: entry.shape for name, entry in entries.items()}, shape, source)
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
    folder = _check_folder(path)
    config_bytes, config = _read_config(folder)
    if check is not None:
        check(config)
    source = str(folder / WEIGHTS_NAME)
    with open_regular(source, _FILE_EXPECTED) as file:
        start, entries = _read_header(file, source)
        # Before the data, so that a large file with a wrong header is never read.
        shapes = {name: entry.shape for name, entry in entries.items()}
        _check_shapes(config, shapes, shape, source)
        weights = start + file.read()
    digest = _digest(config_bytes, weights)
    if expected_digest is not None and digest != expected_digest:
        raise AdapterError(
            f"{folder}: the files changed since the adapter was registered: expected digest "
            f"{expected_digest}, found {digest}; register it again"
        )
    tensors = _all_at_once(weights, len(start), entries)
    if tensors is None:
        try:
            stored = safetensors.torch.load(weights)
        except (SafetensorError, ValueError, RuntimeError) as error:
            raise AdapterError(f"{source}: expected {_FILE_EXPECTED}, found {error}") from error
        tensors = {name: _finite_float32(name, stored[name], source) for name in entries}
    return Adapter(config, tensors, digest, str(folder))


def _all_at_once(
    weights: bytes, offset: int, entries: Mapping[str, _Entry]
) -> dict[str, Tensor] | None:
    """The tensors in float32, widened and checked as one, where the file has one dtype.

    A worker loads an adapter between two steps of a batch that waits, and a hundred small tensors
    one by one take several times as long.

    Returns:
        Views of one tensor; None where it takes a closer look, at each tensor by itself.
    """
    dtypes = {entry.dtype for entry in entries.values()}
    if len(dtypes) != 1:
        return None
    data = np.frombuffer(weights, np.uint8, offset=offset)
    # NumPy, because torch would start its threads, and wait for those that are busy elsewhere.
    match dtypes.pop():
        case "F32":
            values = data.view(np.float32).copy()
        case "F16":
            values = data.view(np.float16).astype(np.float32)
        case "BF16":  # the upper half of a float32
            halves = data.view("<u2")
            values = np.zeros(len(halves), "<f4")
            values.view("<u2")[1::2] = halves
        case _:
            return None
    if not np.isfinite(values).all():
        return None
    whole = torch.from_numpy(values)
    size = data.nbytes // values.size
    return {
        name: whole[entry.begin // size : entry.end // size].view(entry.shape)
        for name, entry in entries.items()
    }


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
