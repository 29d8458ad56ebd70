"""Where a decoder layer's input is: with its input norm, or with the layer itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def input_of_norm(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
    """The layer's input, `[tokens, d]`, from a call of its input norm.

    vLLM's norms take (x, residual) and return (normed, residual + x), which is the layer's input;
    in the first layer, and in models without the fused form, the argument itself is.
    """
    hidden: Tensor
    if isinstance(output, tuple) and output[1] is not None:
        hidden = output[1]
    else:
        hidden = args[0] if args else next(iter(kwargs.values()))
    return hidden.flatten(0, -2)  # vLLM's Transformers backend has a batch dimension of 1


def input_of_layer(place: int) -> Callable[..., Tensor]:
    """What finds the input in a call of the layer.

    Args:
        place: Of `hidden_states` among the layer's arguments.
    """

    def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> Tensor:
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[place]
        return hidden.flatten(0, -2)

    return input_of
