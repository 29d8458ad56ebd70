"""What a worker needs for PEDRO, whichever model runner it has."""

from __future__ import annotations

import logging
import time
from typing import Any

from torch import nn

from ...backbone import BackboneShape
from ...ops import library
from ...serving.adapters import AdapterBank, AdapterLimits, AdapterReader, HostCache
from ...serving.runtime import PedroRuntime
from ...serving.store import VectorStore
from .. import wire
from ..options import options_of
from .layers import HookedModel, is_compiled, is_split

logger = logging.getLogger("vllm.vllm_pedro")


def build(runner: Any, model: nn.Module) -> HookedModel:
    """Allocate everything that PEDRO needs in a worker, and hook the model.

    Called when LoRA has put its layers in place, so that the sum W x + BA x is what is scaled.

    Args:
        runner: vLLM's model runner, V1's or V2's, whose engine PEDRO is switched on for.
        model: Its model.

    Returns:
        The hooked model, with the runtime.
    """
    return HookedModel(
        model,
        BackboneShape.from_hf_config(runner.vllm_config.model_config.hf_config),
        _build_runtime(runner),
        is_compiled=is_compiled(runner.vllm_config),
        is_split=is_split(runner.vllm_config),
    )


def _build_runtime(runner: Any) -> PedroRuntime:
    vllm_config, device = runner.vllm_config, runner.device
    options = options_of(vllm_config)
    assert options is not None
    # Most tokens in one forward pass, padding included.
    captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    max_tokens = max(runner.max_num_tokens, *captured)
    model = vllm_config.model_config
    shape = BackboneShape.from_hf_config(model.hf_config)
    sequences = vllm_config.scheduler_config.max_num_seqs
    limits = AdapterLimits(shape, options.max_pedro_rank, options.pedro_target_modules)
    store = VectorStore(
        shape, options.pedro_target_modules, sequences, max_tokens, model.dtype, device
    )
    reader = AdapterReader(limits, store.columns)
    memory = options.pedro_memory_bytes
    assert memory is not None
    if device.type == "cpu":
        bank = AdapterBank(memory, reader, device, max_adapters=options.max_cpu_pedros)
    else:
        capacity = options.host_capacity(limits.largest_blob)
        host = HostCache(capacity, reader, pin=device.type == "cuda")
        bank = AdapterBank(memory, reader, device, host)
    logger.info(
        "PEDRO: vectors of %d sequences take %.1f MiB; adapters have %.1f MiB, which hold %d of "
        "r = %d with %s in float32, %.2f MiB each, and more of smaller ones",
        sequences,
        store.nbytes / 2**20,
        bank.nbytes / 2**20,
        bank.nbytes // limits.largest_blob,
        limits.max_rank,
        ", ".join(limits.modules),
        limits.largest_blob / 2**20,
    )
    runtime = PedroRuntime(bank, store)
    start = time.perf_counter()
    runtime.warm_up()
    backends = library.backends
    logger.info(
        "PEDRO: operators are %s, ready in %.2f s",
        backends.cpu if device.type == "cpu" else backends.cuda,
        time.perf_counter() - start,
    )
    return runtime


IDLE_SECONDS = 0.005
"""A step without tokens waits so long for an adapter at most; aborts are seen after it."""


def report_of_step(runtime: PedroRuntime, is_idle: bool = False) -> wire.StepReport:
    """What happened since the last report.

    Args:
        runtime: The worker's.
        is_idle: The step had no tokens, perhaps because what waits has no adapter yet.
    """
    loaded, lost = runtime.take_loaded(IDLE_SECONDS if is_idle else 0.0)
    return wire.StepReport(runtime.take_failed(), runtime.take_stats(), loaded, lost)


def execute(runtime: PedroRuntime, original: Any, scheduler_output: Any, *args: Any) -> Any:
    """A runner's `execute_model` with what PEDRO does before and after.

    Args:
        runtime: The worker's.
        original: vLLM's method.
        scheduler_output: The step.
        *args: The others.
    """
    runtime.prefetch(wire.prefetches_of(scheduler_output))
    output = original(scheduler_output, *args)
    runtime.step_launched()
    if not scheduler_output.total_num_scheduled_tokens and output is not None:
        return wire.with_report(output, report_of_step(runtime, is_idle=True))
    return output
