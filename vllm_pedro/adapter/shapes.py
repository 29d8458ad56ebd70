"""Which tensors of which shapes an adapter must have, and the errors where it has others."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from typing import NamedTuple

from ..backbone import BackboneShape
from ..config import PedroConfig
from ..errors import AdapterError, PedroError
from ..files import shorten
from .names import BIAS, DENOMINATOR, DOWN, DOWN_BIAS, LAYER_NAME, NUMERATOR, UP, tensor_name


class _Size(NamedTuple):
    """What the tensors' names and shapes depend on, besides the config."""

    num_layers: int
    hidden_size: int
    width: int  # D


def _size(config: PedroConfig, shape: BackboneShape) -> _Size:
    width = sum(shape.split_widths(config.target_modules))
    return _Size(shape.num_layers, shape.hidden_size, width)


def expected_shapes(config: PedroConfig, shape: BackboneShape) -> Mapping[str, tuple[int, ...]]:
    """Shape of each tensor, by its on-disk name.

    Raises:
        PedroError: the config does not fit the backbone.
    """
    return _expected(config, _size(config, shape))


def _expected(config: PedroConfig, size: _Size) -> Mapping[str, tuple[int, ...]]:
    config.validate(size.num_layers)
    kinds = config.activation if isinstance(config.activation, str) else tuple(config.activation)
    return _expected_of(config.r, config.down_bias, kinds, config.rational_order, size)


# Cached, because a server's adapters are mostly of a few sizes, and its steps wait for it.
@functools.lru_cache(maxsize=16)
def _expected_of(
    r: int, down_bias: bool, kinds: str | tuple[str, ...], order: tuple[int, int], size: _Size
) -> Mapping[str, tuple[int, ...]]:
    m, n = order
    result: dict[str, tuple[int, ...]] = {}
    for layer in range(size.num_layers):
        if r > 0:
            result[tensor_name(layer, DOWN)] = (r, size.hidden_size)
            if down_bias:
                result[tensor_name(layer, DOWN_BIAS)] = (r,)
            result[tensor_name(layer, UP)] = (size.width, r)
        result[tensor_name(layer, BIAS)] = (size.width,)
        if r > 0 and (kinds if isinstance(kinds, str) else kinds[layer]) == "rational":
            result[tensor_name(layer, NUMERATOR)] = (m + 1,)
            result[tensor_name(layer, DENOMINATOR)] = (n,)
    return result


def _infer_size(config: PedroConfig, shapes: Mapping[str, tuple[int, ...]], source: str) -> _Size:
    """The size that layer 0's tensors have; `check_shapes` compares the other layers with it."""
    num_layers = len(_layers_found(shapes))
    if num_layers == 0:
        raise AdapterError(
            f"{source}: expected tensors named {tensor_name(0, BIAS)!r} and so on, "
            f"found {shorten(sorted(shapes)) or 'none'}"
        )
    bias = shapes.get(tensor_name(0, BIAS), ())
    down = shapes.get(tensor_name(0, DOWN), ())
    # A shape with the wrong number of dimensions gives no size; 0 never matches and is refused.
    return _Size(
        num_layers,
        down[1] if len(down) == 2 else 0,
        bias[0] if len(bias) == 1 else 0,
    )


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
    size = _infer_size(config, shapes, source) if shape is None else _size(config, shape)
    with contextlib.suppress(PedroError):
        if shapes == _expected(config, size):
            return
    # The tensors are wrong. The rest finds the first difference for the message.
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
    widths = zip(config.target_modules, shape.split_widths(config.target_modules), strict=True)
    return ", ".join(f"{module} {width}" for module, width in widths)


def _differs_by_backbone(name: str, found: tuple[int, ...], want: tuple[int, ...]) -> bool:
    """Whether only the dimension set by the backbone, not the one set by the config, differs."""
    if name.endswith(DOWN):
        return found[0] == want[0]
    if name.endswith(UP):
        return found[1] == want[1]
    return name.endswith(BIAS)
