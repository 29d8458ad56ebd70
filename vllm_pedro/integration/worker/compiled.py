"""Hooks for the compiler to trace, the fastest exact form of each, see docs/kernels.md.

A step outside of the graph runs them too, as plain Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...serving.layer import PedroLayer
from ...serving.store import VectorStore


class Generation:
    """Where a layer's vectors are generated.

    Compiled, not at the input norm but behind the layer's first scaled projection: where the graph
    is split there, the norm stays in one piece with what quantises its output.

    Args:
        state: The layer.
        store: Whose vectors they are.
        input_of: What finds the layer's input in a call of the module that reads it.
        is_split: Whether the compiled graph is split at the generators, so that the pieces between
            them are CUDA graphs of steps that generate, too.
    """

    def __init__(
        self,
        state: PedroLayer,
        store: VectorStore,
        input_of: Callable[..., Tensor],
        is_split: bool,
    ) -> None:
        self._state = state
        self._store = store
        self._input_of = input_of
        self._is_split = is_split
        self._waiting: list[torch.Tensor] = []

    def input_hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None
    ) -> None:
        """Behind the layer's input norm; before the layer, if it has none."""
        hidden = self._input_of(args, kwargs, output)
        if not torch.compiler.is_compiling():
            if self._store.has_prefills:
                self._state.generate(hidden)
            return
        if not self._is_split:
            # A copy, not the residual itself: Inductor keeps that in float32 across fused kernels,
            # and an operator that reads it would force it into 16 bits there, for base rows too.
            hidden = hidden * self._state.one
        self._waiting.append(hidden)

    def projection_hook(self, module: nn.Module, args: Any, output: Any = None) -> None:
        """Behind the layer's first scaled projection, before it is scaled, or its input is."""
        if torch.compiler.is_compiling():
            self._state.generate(self._waiting.pop())


def scale_hook(
    state: PedroLayer,
    store: VectorStore,
    columns: slice,
    offset: int,
    total: int,
    compiled_elsewhere: bool,
) -> Callable[..., Any]:
    """Scale a packed projection: the fastest exact form of each mode, see docs/kernels.md."""
    width = columns.stop - columns.start
    ranges = (offset, columns.start, width)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        if not torch.compiler.is_compiling():
            # The operator would return at once, but getting there takes a while, in each layer.
            if store.scales_rows:
                state.scale_(x if x.dim() == 2 else x.flatten(0, -2), ranges)
            return None
        if compiled_elsewhere:
            return output
        if width == total:
            x = state.scaled(x, columns)
        else:
            end = offset + width
            middle = state.scaled(x[..., offset:end], columns)
            x = torch.cat((x[..., :offset], middle, x[..., end:]), dim=-1)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    return hook


def scale_input_hook(
    state: PedroLayer, store: VectorStore, columns: slice
) -> Callable[..., tuple[Any, ...] | None]:
    """Scale all that a module reads."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if torch.compiler.is_compiling() or store.scales_rows:
            return (state.scaled(args[0], columns), *args[1:])
        return None

    return hook


def value_hook(state: PedroLayer) -> Callable[..., Any]:
    """Compiled, hand V to attention as a tensor of its own.

    As it comes it is a view of the scaled packed projection, which Inductor would then have to
    write out whole, Q and K too, although whoever else reads those computes them on the fly.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.compiler.is_compiling() or len(args) < 3:
            return None
        return (*args[:2], args[2] * state.one, *args[3:])

    return hook


def activation_hook(state: PedroLayer, columns: slice) -> Callable[..., Any]:
    """Compiled, scale Up after the activation, act(G) * U * l, where Inductor fuses all of it.

    Scaled before, gate and up would have to be put together again for the activation to take them
    apart, and on the CPU Inductor writes that out.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.compiler.is_compiling():
            return None
        return state.scaled(output, columns)

    return hook
