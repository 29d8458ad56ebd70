"""What a worker needs for PEDRO, whichever model runner it has."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from ...backbone import BackboneShape
from ...ops import library
from ...serving.adapters import AdapterBank, AdapterLimits, AdapterReader, HostCache
from ...serving.columns import StoreColumns
from ...serving.runtime import PedroRuntime
from ...serving.store import VectorStore
from .. import wire
from ..options import PedroOptions, options_of
from .layers import HookedModel, is_compiled, is_split
from .places import find_places

logger = logging.getLogger("vllm.vllm_pedro")


def build(runner: Any, model: nn.Module, shape: BackboneShape) -> HookedModel:
    """Allocate everything that PEDRO needs in a worker, and hook the model.

    Called when LoRA has put its layers in place, so that the sum W x + BA x is what is scaled.

    Args:
        runner: vLLM's model runner, V1's or V2's, whose engine PEDRO is switched on for.
        model: Its model.
        shape: The backbone's, by its configuration before the model was loaded.

    Returns:
        The hooked model, with the runtime.
    """
    options = options_of(runner.vllm_config)
    assert options is not None
    config = runner.vllm_config.model_config.hf_text_config
    layers = find_places(model, config, shape, options.pedro_target_modules)
    codes = [np.zeros(0, np.int64)] * shape.num_layers
    for layer in layers:
        codes[layer.index] = layer.codes
    runtime = _build_runtime(runner, options, StoreColumns(shape, codes))
    return HookedModel(
        layers,
        config,
        runtime,
        is_compiled=is_compiled(runner.vllm_config),
        is_split=is_split(runner.vllm_config),
    )


def _build_runtime(runner: Any, options: PedroOptions, columns: StoreColumns) -> PedroRuntime:
    vllm_config, device = runner.vllm_config, runner.device
    # Most tokens in one forward pass, padding included.
    captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    max_tokens = max(runner.max_num_tokens, *captured)
    model = vllm_config.model_config
    sequences = vllm_config.scheduler_config.max_num_seqs
    limits = AdapterLimits(columns.shape, options.max_pedro_rank, options.pedro_target_modules)
    store = VectorStore(columns, sequences, max_tokens, model.dtype, device)
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
    runtime = PedroRuntime(bank, store, failed_on_some_rank())
    start = time.perf_counter()
    runtime.warm_up()
    backends = library.backends
    logger.info(
        "PEDRO: operators are %s, ready in %.2f s",
        backends.cpu if device.type == "cpu" else backends.cuda,
        time.perf_counter() - start,
    )
    return runtime


def failed_on_some_rank() -> Callable[[list[bool]], list[bool]] | None:
    """See `PedroRuntime`: the ranks of tensor parallelism; None where there is one.

    vLLM hears one of them, so that they have to fail together.
    """
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return None

    def failed(here: list[bool]) -> list[bool]:
        flags = torch.tensor(here, dtype=torch.uint8)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group.cpu_group)
        return [bool(flag) for flag in flags.tolist()]

    return failed


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


def reports() -> bool:
    """Whether the scheduler hears this worker: it does not those with earlier layers."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def execute(runtime: PedroRuntime, original: Any, scheduler_output: Any, *args: Any) -> Any:
    """A runner's `execute_model` with what PEDRO does before and after.

    Args:
        runtime: The worker's.
        original: vLLM's method.
        scheduler_output: The step.
        *args: The others.
    """
    runtime.prefetch(wire.prefetches_of(scheduler_output))
    received = args[0] if args else None
    runtime.failed_before(() if received is None else wire.take_failures(received))
    output = original(scheduler_output, *args)
    runtime.step_launched()
    if hasattr(output, "tensors"):  # for the next stage, which reports
        failed = runtime.take_failed()
        if failed:
            wire.hand_on_failures(output, failed)
        return output
    if output is None:  # tokens are sampled, or V2 pools, in a call of their own
        return None
    if not scheduler_output.total_num_scheduled_tokens:
        return wire.with_report(output, report_of_step(runtime, is_idle=True))
    if reports():  # V1 has pooled
        wire.put_report(output, report_of_step(runtime))
    return output
