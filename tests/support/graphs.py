"""A GPU's choice of CUDA graphs on the CPU: vLLM's own code with a GPU's capture sizes.

On the CPU vLLM captures nothing, so its graph managers always answer NONE. Here they have what a
GPU's would have, their captures are marked as done, and each step's choice is written down. The
step itself then runs without a graph.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from runners import current_runner
from torch.utils._python_dispatch import TorchDispatchMode

CAPTURE_SIZES = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128]


@dataclass
class Choice:
    """One step.

    Attributes:
        generates: Whether it makes vectors, by what the scheduler told the workers.
        with_adapters: Whether a row of it has an adapter.
        alone: What vLLM chooses by itself: "NONE", "PIECEWISE" or "FULL".
        chosen: What is chosen with PEDRO.
    """

    generates: bool
    with_adapters: bool
    alone: str
    chosen: str


@contextlib.contextmanager
def chosen_graphs(
    start: Callable[..., contextlib.AbstractContextManager[Any]], choices: list[Choice]
) -> Iterator[Any]:
    """Start an engine that adds each step's choice to `choices`; the `LLM`."""
    now: dict[str, bool] = {}
    with contextlib.ExitStack() as stack:
        if current_runner() == "v2":
            stack.enter_context(_recorded_by_v2(now, choices))
        llm = stack.enter_context(start())
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        if current_runner() == "v1":
            _record_v1(runner.model_runner, now, choices)
        _observe_steps(runner.model_runner, now)
        yield llm


@contextlib.contextmanager
def compiled_in_pieces(backend: str) -> Iterator[list[list[str]]]:
    """On the CPU, have vLLM compile a model as it does for a GPU: in pieces.

    Args:
        backend: What compiles a piece: "eager" or "inductor".

    Yields:
        For each model that was compiled, its pieces: the operators at which it is split, and "" for
        what lies between them.
    """
    from vllm.compilation import backends
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    found: list[list[str]] = []
    split, check = backends.split_graph, CpuPlatform.check_and_update_config

    def split_graph(*args: Any) -> Any:
        result = split(*args)
        found.append(
            [
                " ".join(str(node.target) for node in item.graph.graph.nodes if _is_custom(node))
                if item.is_splitting_graph
                else ""
                for item in result[1]
            ]
        )
        return result

    def check_and_update_config(vllm_config: Any) -> None:
        check(vllm_config)
        config = vllm_config.compilation_config
        config.mode, config.backend = CompilationMode.VLLM_COMPILE, backend
        config.compile_sizes = []

    with (
        mock.patch.object(backends, "split_graph", split_graph),
        mock.patch.object(
            CpuPlatform, "check_and_update_config", staticmethod(check_and_update_config)
        ),
        # It asks for operators that only a GPU's build has; there is nothing for it to do here.
        mock.patch.object(FixFunctionalizationPass, "__call__", return_value=None),
        mock.patch.dict(os.environ, {"VLLM_DISABLE_COMPILE_CACHE": "1"}),
    ):
        yield found


def _is_custom(node: Any) -> bool:
    return isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)


def _observe_steps(runner: Any, now: dict[str, bool]) -> None:
    """Keep in `now` what the scheduler said of the step that runs."""
    from vllm_pedro.integration import wire

    execute = runner.execute_model

    def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        entering = wire.assignments_of(scheduler_output)
        rows = scheduler_output.num_scheduled_tokens
        now["generates"] = any(a.must_generate for a in entering.values())
        now["with_adapters"] = any(i in entering or runner.pedro.row_of(i) for i in rows)
        try:
            return execute(scheduler_output, *args, **kwargs)
        finally:
            now.clear()

    runner.execute_model = execute_model


@contextlib.contextmanager
def _recorded_by_v2(now: dict[str, bool], choices: list[Choice]) -> Iterator[None]:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    class GpuLikeManager(cudagraph_utils.ModelCudaGraphManager):
        def __init__(
            self, vllm_config: Any, device: Any, mode: Any, *args: Any, **kwargs: Any
        ) -> None:
            config = vllm_config.compilation_config
            config.cudagraph_capture_sizes = CAPTURE_SIZES
            config.max_cudagraph_capture_size = CAPTURE_SIZES[-1]
            # Without a mode, so that it asks for no pool of a GPU's memory.
            super().__init__(vllm_config, device, CUDAGraphMode.NONE, *args, **kwargs)
            self.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
            self._init_candidates()
            self._graphs_captured = True

    original = model_runner.dispatch_cg_and_sync_dp

    def dispatch(manager: Any, *args: Any, **kwargs: Any) -> Any:
        if now:
            plain = object.__new__(GpuLikeManager)
            plain.__dict__.update(manager.__dict__)
            alone, chosen = (original(m, *args, **kwargs)[0] for m in (plain, manager))
            choices.append(Choice(**now, alone=alone.cg_mode.name, chosen=chosen.cg_mode.name))
        return original(manager, *args, **{**kwargs, "need_eager": True})

    replaced = {"ModelCudaGraphManager": GpuLikeManager, "dispatch_cg_and_sync_dp": dispatch}
    before = {name: getattr(model_runner, name) for name in replaced}
    for name, value in replaced.items():
        setattr(model_runner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model_runner, name, value)


def _record_v1(runner: Any, now: dict[str, bool], choices: list[Choice]) -> None:
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    config = runner.vllm_config.compilation_config
    config.cudagraph_capture_sizes = CAPTURE_SIZES
    config.max_cudagraph_capture_size = CAPTURE_SIZES[-1]
    runner.cudagraph_dispatcher.initialize_cudagraph_keys(
        CUDAGraphMode.FULL_AND_PIECEWISE, runner.uniform_decode_query_len
    )
    with_pedro = runner._determine_batch_execution_and_padding
    plain = GPUModelRunner._determine_batch_execution_and_padding

    def determine(*args: Any, **kwargs: Any) -> Any:
        if now:
            alone = plain(runner, *args, **kwargs)[0].name
            chosen = with_pedro(*args, **kwargs)[0].name
            choices.append(Choice(**now, alone=alone, chosen=chosen))
        return plain(runner, *args, **{**kwargs, "force_eager": True})

    runner._determine_batch_execution_and_padding = determine


class Tape(TorchDispatchMode):
    """The operators of a forward pass, to be run again without Python, as a graph's replay does."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, _tensors(result)))
        return result

    def __len__(self) -> int:
        return len(self._calls)

    def names(self) -> list[str]:
        """The operators, in order."""
        return [str(func) for func, *_ in self._calls]

    def replay(self) -> None:
        """Run the same operators over the same buffers; results go where they went before."""
        for func, args, kwargs, results in self._calls:
            for old, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(result: Any) -> list[torch.Tensor]:
    values = result if isinstance(result, (tuple, list)) else [result]
    return [value for value in values if isinstance(value, torch.Tensor)]
