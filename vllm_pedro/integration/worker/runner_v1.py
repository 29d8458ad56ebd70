"""PEDRO on vLLM's V1 model runner, which the CPU uses, and GPUs where V2 does not fit."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...serving.runtime import PedroRuntime
from .. import wire
from ..options import shape_of
from .build import build, execute, report_of_step, reports
from .layers import HookedModel


class PedroRunnerV1Mixin:
    """What `GPUModelRunner` and `CPUModelRunner` do differently when PEDRO is on."""

    pedro: PedroRuntime
    pedro_model: HookedModel
    input_batch: Any
    vllm_config: Any
    intermediate_tensors: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        shape = shape_of(self.vllm_config)
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self.pedro_model = build(self, self.get_model(), shape)  # type: ignore[attr-defined]
        self.pedro = self.pedro_model.runtime
        self._make_intermediate_tensors()

    def _make_intermediate_tensors(self) -> None:
        """What a later pipeline stage receives into; vLLM's CPU worker leaves out the dummy run
        that makes them."""
        from vllm.distributed import get_pp_group

        if not get_pp_group().is_first_rank and self.intermediate_tensors is None:
            self.intermediate_tensors = self.get_model().make_empty_intermediate_tensors(  # type: ignore[attr-defined]
                batch_size=self.max_num_tokens,  # type: ignore[attr-defined]
                dtype=self.dtype,  # type: ignore[attr-defined]
                device=self.device,  # type: ignore[attr-defined]
            )

    def _update_states(self, scheduler_output: Any) -> Any:
        self.pedro.finish(scheduler_output.finished_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            spec = wire.spec_of(wire.params_of(request))
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

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        original = partial(super().execute_model, **kwargs)  # type: ignore[misc]
        return execute(self.pedro, original, scheduler_output, *args)

    def _determine_batch_execution_and_padding(
        self,
        *args: Any,
        force_eager: bool = False,
        force_uniform_decode: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """No full CUDA graph for a step that generates vectors.

        A one-token prompt, or a prompt that hits the cache up to its last token, looks like a
        decode and would replay a graph in which the generators never ran. Piecewise graphs are
        right where the generators run between the pieces.
        """
        if self.pedro.generates_vectors:
            mode = self.cudagraph_dispatcher.cudagraph_mode  # type: ignore[attr-defined]
            # Where full graphs are those of decodes, no other batch replays one.
            if self.pedro_model.is_split and mode.separate_routine():
                force_uniform_decode = False
            else:
                force_eager = True
        return super()._determine_batch_execution_and_padding(  # type: ignore[misc]
            *args, force_eager=force_eager, force_uniform_decode=force_uniform_decode, **kwargs
        )

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "pedro_model"):
            self.pedro_model.clear_step()
        return super()._dummy_run(*args, **kwargs)  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)  # type: ignore[misc]
        report = report_of_step(self.pedro)
        if reports():
            wire.put_report(output, report)
        return output
