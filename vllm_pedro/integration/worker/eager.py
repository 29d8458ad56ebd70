"""Without a compiler: PEDRO's part of each layer, put in and taken out from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...serving.layer import PedroLayer

_Replaced = tuple[Any, str, Callable[..., Any]]
"""An object, the name of a method of it, and what takes its place."""


class ForwardSwitch:
    """Without a compiler: PEDRO's part of each layer, there only in steps that need it.

    A step without adapters then runs the very code of an engine without PEDRO, and a decode step
    none of the generators'. Modules get a `forward` of their own in place of a hook, because a
    module with hooks takes a longer way through `nn.Module.__call__`, at each call.
    """

    def __init__(self) -> None:
        self._generating: list[_Replaced] = []
        self._scaling: list[_Replaced] = []
        self._generates = self._scales = False

    def add_generator(
        self, module: nn.Module, state: PedroLayer, input_of: Callable[..., Tensor]
    ) -> None:
        """Run a layer's generators on what its input norm reads."""
        original, generate = module.forward, state.generate

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            generate(input_of(args, kwargs, output))
            return output

        self._generating.append((module, "forward", forward))

    def add_generator_before(
        self, layer: nn.Module, state: PedroLayer, input_of: Callable[..., Tensor]
    ) -> None:
        """The same on what the layer itself reads, which it may change afterwards."""
        original, generate = layer.forward, state.generate

        def forward(*args: Any, **kwargs: Any) -> Any:
            generate(input_of(args, kwargs))
            return original(*args, **kwargs)

        self._generating.append((layer, "forward", forward))

    def add_scaling(
        self, projection: nn.Module, state: PedroLayer, ranges: tuple[int, int, int]
    ) -> None:
        """Scale a packed projection's output in place."""
        original, scale_ = projection.forward, state.scale_

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            x = output[0] if isinstance(output, tuple) else output
            scale_(x if x.dim() == 2 else x.flatten(0, -2), ranges)
            return output

        self._scaling.append((projection, "forward", forward))

    def add_scaling_before(
        self, module: nn.Module, state: PedroLayer, ranges: tuple[int, int, int]
    ) -> None:
        """Scale what a module reads, in place."""
        original, scale_ = module.forward, state.scale_

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            scale_(x if x.dim() == 2 else x.flatten(0, -2), ranges)
            return original(x, *args, **kwargs)

        self._scaling.append((module, "forward", forward))

    def add_experts(self, kernel: Any, name: str, method: Callable[..., Any]) -> None:
        """Compute routed experts by another method of theirs."""
        self._scaling.append((kernel, name, method))

    def __call__(self, generates: bool, scales: bool) -> None:
        """Get ready for a step.

        Args:
            generates: Whether it generates vectors.
            scales: Whether it has rows with an adapter.
        """
        if generates != self._generates:
            self._set(self._generating, generates)
            self._generates = generates
        if scales != self._scales:
            self._set(self._scaling, scales)
            self._scales = scales

    @staticmethod
    def _set(replaced: list[_Replaced], on: bool) -> None:
        for owner, name, function in replaced:
            if on:
                owner.__dict__[name] = function
            else:
                del owner.__dict__[name]
