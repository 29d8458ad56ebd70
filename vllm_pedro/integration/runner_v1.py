"""PEDRO on vLLM's V1 model runner, which the CPU uses, and GPUs where V2 does not fit."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from ..config import BackboneShape
from ..ops import library
from ..serving.adapters import AdapterBank, AdapterLimits, HostCache
from ..serving.runtime import PedroRuntime
from ..serving.store import VectorStore
from . import wire
from .layers import HookedModel, is_compiled
from .options import PedroOptions, options_of

logger = logging.getLogger("vllm.vllm_pedro")


def build_runtime(
    vllm_config: Any, options: PedroOptions, device: torch.device, max_tokens: int
) -> PedroRuntime:
    """Allocate everything that PEDRO needs in a worker.

    Args:
        vllm_config: vLLM's configuration.
        options: The PEDRO options.
        device: Where the model is.
        max_tokens: Most tokens in one forward pass, padding included.
    """
    model = vllm_config.model_config
    shape = BackboneShape.from_hf_config(model.hf_config)
    sequences = vllm_config.scheduler_config.max_num_seqs
    limits = AdapterLimits(shape, options.max_pedro_rank, options.pedro_target_modules)
    store = VectorStore(
        shape, options.pedro_target_modules, sequences, max_tokens, model.dtype, device
    )
    bank = AdapterBank(options.max_pedros, limits, store.columns, device)
    host = HostCache(options.host_capacity, limits)
    logger.info(
        "PEDRO: vectors of %d sequences take %.1f MiB, generators of %d adapters %.1f MiB",
        sequences,
        store.nbytes / 2**20,
        options.max_pedros,
        bank.nbytes / 2**20,
    )
    runtime = PedroRuntime(host, bank, store)
    start = time.perf_counter()
    runtime.warm_up()
    backends = library.backends
    logger.info(
        "PEDRO: operators are %s, ready in %.2f s",
        backends.cpu if device.type == "cpu" else backends.cuda,
        time.perf_counter() - start,
    )
    return runtime


def report_of_step(runtime: PedroRuntime) -> wire.StepReport:
    """What happened since the last report."""
    return wire.StepReport(runtime.take_failed(), runtime.take_stats())


class PedroRunnerV1Mixin:
    """What `GPUModelRunner` and `CPUModelRunner` do differently when PEDRO is on."""

    pedro: PedroRuntime
    pedro_model: HookedModel
    vllm_config: Any
    device: torch.device
    max_num_tokens: int
    input_batch: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        options = options_of(self.vllm_config)
        assert options is not None
        captured = self.vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        max_tokens = max(self.max_num_tokens, *captured)
        self.pedro = build_runtime(self.vllm_config, options, self.device, max_tokens)
        # After LoRA has put its layers in place, so that the sum W x + BA x is what is scaled.
        self.pedro_model = HookedModel(
            self.get_model(),  # type: ignore[attr-defined]
            self.pedro.bank.limits.shape,
            self.pedro,
            is_compiled=is_compiled(self.vllm_config),
        )

    def _update_states(self, scheduler_output: Any) -> Any:
        self.pedro.finish(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            spec = wire.spec_of(request.sampling_params)
            if spec is not None:
                self.pedro.admit(request.req_id, spec)
        if self.pedro.has_requests:
            self.pedro.assign(wire.assignments_of(scheduler_output))
        return super()._update_states(scheduler_output)  # type: ignore[misc]

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]
        batch = self.input_batch
        rows = len(num_scheduled_tokens)
        self.pedro_model.prepare_step(
            batch.req_ids[:rows], num_scheduled_tokens, batch.num_computed_tokens_cpu[:rows]
        )
        return prepared

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        output = super().execute_model(*args, **kwargs)  # type: ignore[misc]
        self.pedro.step_launched()
        return output

    def _determine_batch_execution_and_padding(
        self, *args: Any, force_eager: bool = False, **kwargs: Any
    ) -> Any:
        """No CUDA graph for a step that generates vectors.

        A one-token prompt, or a prompt that hits the cache up to its last token, looks like a
        decode and would replay a graph in which the generators never ran.
        """
        return super()._determine_batch_execution_and_padding(  # type: ignore[misc]
            *args, force_eager=force_eager or self.pedro.generates_vectors, **kwargs
        )

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "pedro_model"):
            self.pedro_model.clear_step()
        return super()._dummy_run(*args, **kwargs)  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        wire.put_report(output, report_of_step(self.pedro))
        return output
