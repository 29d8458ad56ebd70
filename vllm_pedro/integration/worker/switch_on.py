"""A switched-on worker's model runner becomes PEDRO's before it loads the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..options import options_of
from ..patches import become, extend


def v1(original: Callable[..., None]) -> Callable[..., None]:
    """Patch of V1's runners: the CPU's has a `load_model` of its own."""
    from .runner_v1 import PedroRunnerV1Mixin

    return _load_as(PedroRunnerV1Mixin, original)


def v2(original: Callable[..., None]) -> Callable[..., None]:
    """Patch of the V2 runner, whose module shares nothing with V1's."""
    from .runner_v2 import PedroRunnerV2Mixin

    return _load_as(PedroRunnerV2Mixin, original)


def model_state(original: Callable[..., type]) -> Callable[..., type]:
    """Patch of V2's `model_states`: PEDRO's subclass of the model's `ModelState`."""
    from .runner_v2 import PedroModelStateMixin

    def resolve_model_state_cls(vllm_config: Any, model: Any) -> type:
        cls = original(vllm_config, model)
        return cls if options_of(vllm_config) is None else extend(cls, PedroModelStateMixin)

    return resolve_model_state_cls


def _load_as(mixin: type, original: Callable[..., None]) -> Callable[..., None]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        if options_of(self.vllm_config) is None or isinstance(self, mixin):
            return original(self, *args, **kwargs)
        become(self, mixin)
        return self.load_model(*args, **kwargs)

    return load_model
