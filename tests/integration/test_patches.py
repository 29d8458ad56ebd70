"""How vLLM's classes and functions are extended, on the real ones."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import types

import pytest
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_pedro import integration
from vllm_pedro.integration.frontend.metrics import PedroOutputProcessorMixin
from vllm_pedro.integration.frontend.models import PedroServingModelsMixin
from vllm_pedro.integration.frontend.processor import PedroInputProcessorMixin
from vllm_pedro.integration.patches import become, extend, wrap
from vllm_pedro.integration.plugin import PATCHES
from vllm_pedro.integration.scheduler import PedroScheduler, PedroSchedulerMixin
from vllm_pedro.integration.worker.runner_v1 import PedroRunnerV1Mixin
from vllm_pedro.integration.worker.runner_v2 import (
    PedroGraphsMixin,
    PedroModelStateMixin,
    PedroRunnerV2Mixin,
)

CHANGED = [
    (InputProcessor, PedroInputProcessorMixin),
    (OutputProcessor, PedroOutputProcessorMixin),
    (OpenAIServingModels, PedroServingModelsMixin),
    (GPUModelRunner, PedroRunnerV1Mixin),
    (CPUModelRunner, PedroRunnerV1Mixin),
    (GPUModelRunnerV2, PedroRunnerV2Mixin),
    (CPUModelRunnerV2, PedroRunnerV2Mixin),
    (ModelCudaGraphManager, PedroGraphsMixin),
]


def show(value):
    return f"{value.__module__}.{value.__qualname__}"


@pytest.mark.parametrize(("cls", "mixin"), CHANGED, ids=show)
def test_an_instance_of_the_real_class_can_change(cls, mixin):
    instance = object.__new__(cls)
    become(instance, mixin)
    assert type(instance).__mro__[:3] == (type(instance), mixin, cls)
    changed = type(instance)
    become(instance, mixin)
    assert type(instance) is changed


def test_a_class_is_chosen_before_there_is_an_instance():
    extended = extend(DefaultModelState, PedroModelStateMixin)
    assert extended.__mro__[:3] == (extended, PedroModelStateMixin, DefaultModelState)
    assert isinstance(object.__new__(extended), PedroModelStateMixin)
    assert extend(extended, PedroModelStateMixin) is extended


def test_where_a_class_cannot_change_the_error_says_so():
    """ModelState derives from ABC, so Python lays out its instances in another way."""
    with pytest.raises(RuntimeError, match=r"PedroModelStateMixin in front of .*DefaultModelState"):
        become(object.__new__(DefaultModelState), PedroModelStateMixin)


def test_methods_that_call_vllm_s_own_are_methods_of_the_real_class():
    """Else vLLM does not know them either, and they never run."""
    for cls, mixin in [*CHANGED, (DefaultModelState, PedroModelStateMixin)]:
        for name, value in vars(mixin).items():
            if isinstance(value, types.FunctionType) and name != "__init__":
                calls_its_own = f"super().{name}(" in inspect.getsource(value)
                assert hasattr(cls, name) or not calls_its_own, (cls, name)


def test_no_mixin_is_left_out():
    tried = {mixin for _, mixin in CHANGED} | {PedroModelStateMixin, PedroSchedulerMixin}
    found = set()
    for info in pkgutil.walk_packages(integration.__path__, f"{integration.__name__}."):
        module = importlib.import_module(info.name)
        found |= {v for n, v in vars(module).items() if n.endswith("Mixin") and "Pedro" in n}
    assert found == tried
    assert issubclass(PedroScheduler, PedroSchedulerMixin)


class Upstream:
    def method(self, x):
        return x


def test_wrapping_is_done_once_and_calls_the_original():
    def twice(original):
        return lambda self, x: 2 * original(self, x)

    class Target(Upstream):
        def method(self, x):
            return x + 1

    wrap(Target, "method", twice)
    wrap(Target, "method", twice)
    assert Target().method(1) == 4


def test_a_second_patch_of_one_function_is_a_mistake():
    def other(original):
        return original

    class Target:
        @classmethod
        def method(cls):
            return 1

    def more(original):
        return lambda cls: original(cls) + 1

    wrap(Target, "method", more)
    wrap(Target, "method", more)
    assert Target.method() == 2
    with pytest.raises(RuntimeError, match=r"patches .*Target\.method twice: by .*more and by"):
        wrap(Target, "method", other)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.target)
def test_each_listed_patch_can_be_applied_and_says_why(patch):
    patch.apply()
    owner, names = importlib.import_module(patch.module), patch.target.partition(":")[2].split(".")
    for name in names:
        owner = getattr(owner, name)
    assert hasattr(owner, "_vllm_pedro_original")
    assert patch.why
    assert patch.until
    assert re.fullmatch(r"https://github\.com/vllm-project/vllm/(issues|pull)/\d+", patch.upstream)


def test_nothing_is_patched_that_is_not_listed():
    calls = {}
    for info in pkgutil.iter_modules(integration.__path__):
        source = inspect.getsource(importlib.import_module(f"{integration.__name__}.{info.name}"))
        calls[info.name] = len(re.findall(r"(?<!def )\bwrap\(", source))
    assert {name for name, count in calls.items() if count} == {"patches"}


def test_a_module_s_function_is_wrapped_like_a_class_s():
    module = types.ModuleType("somewhere")
    module.function = lambda x: x + 1
    wrap(module, "function", lambda original: lambda x: 2 * original(x))
    assert module.function(1) == 4
    with pytest.raises(RuntimeError, match=r"cannot find somewhere\.gone"):
        wrap(module, "gone", lambda original: original)


def test_a_moved_function_is_noticed():
    class Child(Upstream):
        pass

    with pytest.raises(RuntimeError, match=r"cannot find .*Child\.method"):
        wrap(Child, "method", lambda original: original)


def test_an_instance_changes_class_once():
    class Mixin:
        def method(self, x):
            return -super().method(x)

    thing = Upstream()
    become(thing, Mixin)
    become(thing, Mixin)
    assert thing.method(3) == -3
    assert type(thing).__name__ == "PedroUpstream"
    assert Upstream().method(3) == 3
