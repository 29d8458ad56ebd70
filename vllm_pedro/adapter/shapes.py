"""Which tensors of which shapes an adapter must have, and the errors where it has others."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from typing import Final, NamedTuple

from ..backbone import BackboneShape
from ..config import PedroConfig
from ..errors import AdapterError, PedroError
from ..files import shorten
from .names import BIAS, DENOMINATOR, DOWN, DOWN_BIAS, LAYER_NAME, NUMERATOR, UP, tensor_name


class _Size(NamedTuple):
    """What the tensors' names and shapes depend on, besides the config."""

    hidden_size: int
    widths: tuple[int, ...]  # D of each layer; layers of width 0 have no tensors


def _size(config: PedroConfig, shape: BackboneShape) -> _Size:
    layers = range(shape.num_layers)
    widths = tuple(sum(shape.split_widths(config.target_modules, layer)) for layer in layers)
    return _Size(shape.hidden_size, widths)


def expected_shapes(config: PedroConfig, shape: BackboneShape) -> Mapping[str, tuple[int, ...]]:
    """Shape of each tensor, by its on-disk name.

    Raises:
        PedroError: the config does not fit the backbone.
    """
    return _expected(config, _size(config, shape))


def _expected(config: PedroConfig, size: _Size) -> Mapping[str, tuple[int, ...]]:
    config.validate(len(size.widths))
    kinds = config.activation if isinstance(config.activation, str) else tuple(config.activation)
    return _expected_of(config.r, config.down_bias, kinds, config.rational_order, size)


# Cached, because a server's adapters are mostly of a few sizes, and its steps wait for it.
@functools.lru_cache(maxsize=16)
def _expected_of(
    r: int, down_bias: bool, kinds: str | tuple[str, ...], order: tuple[int, int], size: _Size
) -> Mapping[str, tuple[int, ...]]:
    m, n = order
    result: dict[str, tuple[int, ...]] = {}
    for layer, width in enumerate(size.widths):
        if not width:
            continue
        if r > 0:
            result[tensor_name(layer, DOWN)] = (r, size.hidden_size)
            if down_bias:
                result[tensor_name(layer, DOWN_BIAS)] = (r,)
            result[tensor_name(layer, UP)] = (width, r)
        result[tensor_name(layer, BIAS)] = (width,)
        if r > 0 and (kinds if isinstance(kinds, str) else kinds[layer]) == "rational":
            result[tensor_name(layer, NUMERATOR)] = (m + 1,)
            result[tensor_name(layer, DENOMINATOR)] = (n,)
    return result


def _infer_size(config: PedroConfig, shapes: Mapping[str, tuple[int, ...]], source: str) -> _Size:
    """The size that the tensors have among themselves: layers that have none are of width 0."""
    layers = _layers_found(shapes)
    if not layers:
        raise AdapterError(
            f"{source}: expected tensors named {tensor_name(0, BIAS)!r} and so on, "
            f"found {shorten(sorted(shapes)) or 'none'}"
        )
    first, last = min(layers), max(layers)
    if last >= MAX_LAYERS:
        raise AdapterError(f"{source}: expected at most {MAX_LAYERS} layers, found layer {last}")
    # A shape with the wrong number of dimensions gives no size; -1 never matches and is refused.
    widths = [0] * (last + 1)
    for layer in layers:
        bias = shapes.get(tensor_name(layer, BIAS), ())
        widths[layer] = bias[0] if len(bias) == 1 and bias[0] else -1
    down = shapes.get(tensor_name(first, DOWN), ())
    if isinstance(config.activation, list) and config.r > 0:
        widths += [0] * (len(config.activation) - len(widths))
    return _Size(down[1] if len(down) == 2 else -1, tuple(widths))


MAX_LAYERS: Final = 1 << 12
"""Most layers that a folder is read for."""


def _layers_found(names: Mapping[str, object]) -> set[int]:
    matches = (LAYER_NAME.fullmatch(name) for name in names)
    return {int(match[1]) for match in matches if match}


def check_shapes(
    config: PedroConfig,
    shapes: Mapping[str, tuple[int, ...]],
    shape: BackboneShape | None,
    source: str,
) -> None:
    """Compare names and shapes with those that the config and the backbone ask for.

    Args:
        config: the adapter's.
        shapes: shape of each tensor, by its on-disk name.
        shape: the backbone; None checks only that the tensors agree with each other.
        source: the file, for the message.

    Raises:
        AdapterError: a tensor is missing, unexpected or of another shape.
    """
    if shape is not None:
        try:
            shape.check_modules(config.target_modules)
        except PedroError as error:
            raise AdapterError(f"{source}: {error}") from None
    size = _infer_size(config, shapes, source) if shape is None else _size(config, shape)
    with contextlib.suppress(PedroError):
        if shapes == _expected(config, size):
            return
    # The tensors are wrong. The rest finds the first difference for the message.
    layers = _layers_found(shapes)
    wanted = {layer for layer, width in enumerate(size.widths) if width}
    if shape is not None and layers and layers != wanted:
        without = shape.num_layers - len(wanted)
        bare = f", {without} of which have none of its modules" if without else ""
        raise AdapterError(
            f"{source}: expected tensors for the {shape.num_layers} layers of this backbone{bare}, "
            f"found {len(layers)} layers: missing {shorten(sorted(wanted - layers)) or 'none'}, "
            f"unexpected {shorten(sorted(layers - wanted)) or 'none'}: the adapter was made for "
            "another backbone, or is incomplete"
        )
    try:
        expected = _expected(config, size)
    except PedroError as error:
        raise AdapterError(f"{source}: {error}") from None
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise AdapterError(f"{source}: missing tensors {shorten(missing)}")
    extra = sorted(name for name in shapes if name not in expected)
    if extra:
        raise AdapterError(
            f"{source}: unexpected tensors {shorten(extra)}; the config asks for r = {config.r}, "
            f"down_bias {json.dumps(config.down_bias)}, activation {config.activation!r}"
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
    if name.endswith(DOWN_BIAS):
        return f"r {config.r}"
    if name.endswith(DOWN):
        return f"hidden_size {shape.hidden_size}"
    match = LAYER_NAME.fullmatch(name)
    layer = int(match[1]) if match else 0
    widths = zip(
        config.target_modules, shape.split_widths(config.target_modules, layer), strict=True
    )
    return ", ".join(f"{module} {width}" for module, width in widths)


def _differs_by_backbone(name: str, found: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether only the dimension set by the backbone, not the one set by the config, differs."""
    if name.endswith(DOWN):
        return found[0] == want[0]
    if name.endswith(UP):
        return found[1] == want[1]
    return name.endswith(BIAS)
