"""PEDRO on vLLM's V2 model runner, its default on GPUs, and on CPUs whose Triton has a backend.

The V2 runner hands what belongs to the model to a `ModelState`; PEDRO's is a subclass of the one
that the model asks for. The order of a step, all on the host and without a device sync:

1. the runner removes finished and preempted requests and adds new and resumed ones:
   `PedroModelStateMixin.remove_request`, `PedroModelStateMixin.add_request`;
2. it gathers the batch: here the step is planned, because what comes next depends on it;
3. it picks a CUDA graph: no full one if the step generates vectors (`PedroGraphsMixin`);
4. the forward pass, or the replay of graphs: of a full one, in which generators never run, or of
   pieces, between which they do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from vllm.config.compilation import CUDAGraphMode

from .. import wire
from ..options import shape_of
from ..patches import become
from .build import build, execute, report_of_step, reports


class PedroModelStateMixin:
    """What the model's `ModelState` does differently.

    Attributes:
        preempted: Requests that are out of the batch and come back. They are still the runtime's,
            so that it keeps their adapters.
    """

    pedro: Any
    pedro_model: Any
    preempted: frozenset[str] = frozenset()

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """A request enters, for the first time or after preemption."""
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        self.preempted -= {new_req_data.req_id}
        spec = wire.spec_of(wire.params_of(new_req_data))
        if spec is not None:
            self.pedro.admit(new_req_data.req_id, spec)

    def remove_request(self, req_id: str) -> None:
        """A request is done, aborted or preempted, or enters: vLLM clears its place first."""
        if req_id not in self.preempted:
            self.pedro.finish((req_id,))
        super().remove_request(req_id)  # type: ignore[misc]

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """A graph is about to be captured: no vectors are read or generated."""
        self.pedro_model.clear_step()
        return super().prepare_dummy_inputs(num_reqs, num_tokens)  # type: ignore[misc]


class PedroGraphsMixin:
    """What the CUDA graph manager does differently."""

    pedro: Any
    pedro_model: Any

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        num_ubatches: int = 1,
    ) -> Any:
        """No full CUDA graph for a step that generates vectors.

        A one-token prompt, or a prompt that hits the cache up to its last token, looks like a
        decode and would replay a graph in which the generators never ran. Piecewise graphs are
        right where the generators run between the pieces.
        """
        generates = self.pedro.generates_vectors
        if generates:
            # What vLLM says of a batch with a prefill: it is in no graph of decodes.
            uniform_token_count = max_query_len = None
        found = super().dispatch(  # type: ignore[misc]
            num_reqs,
            num_tokens,
            uniform_token_count,
            num_active_loras,
            max_query_len=max_query_len,
            num_ubatches=num_ubatches,
        )
        if not generates or found.cg_mode == CUDAGraphMode.NONE:
            return found
        # Engines side by side agree on a kind of graph, and vLLM then asks each of them anew: they
        # agree on none.
        is_alone = self.dp_size == 1  # type: ignore[attr-defined]
        if found.cg_mode == CUDAGraphMode.PIECEWISE and self.pedro_model.is_split and is_alone:
            return found
        return replace(
            found,
            cg_mode=CUDAGraphMode.NONE,
            num_tokens=num_tokens,
            num_reqs=num_reqs,
            uniform_token_count=None,
            max_query_len=None,
            num_ubatches=num_ubatches,
        )


class PedroRunnerV2Mixin:
    """What the V2 `GPUModelRunner` does differently when PEDRO is on."""

    pedro: Any
    pedro_model: Any
    model: Any
    model_state: Any
    cudagraph_manager: Any
    req_states: Any
    vllm_config: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        shape = shape_of(self.vllm_config)
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        self.pedro_model = build(self, self.model, shape)
        self.pedro = self.pedro_model.runtime
        # Its class was chosen when the runner created it: see plugin.py.
        self.model_state.pedro, self.model_state.pedro_model = self.pedro, self.pedro_model

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> Any:
        """This creates the graph manager."""
        result = super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        if self.cudagraph_manager is not None:
            become(self.cudagraph_manager, PedroGraphsMixin)
            self.cudagraph_manager.pedro = self.pedro
            self.cudagraph_manager.pedro_model = self.pedro_model
        return result

    def finish_requests(self, scheduler_output: Any) -> None:
        """vLLM removes those that end and those that are preempted in the same way."""
        state = self.model_state
        preempted = scheduler_output.preempted_req_ids or ()
        state.preempted = (state.preempted | set(preempted)) - scheduler_output.finished_req_ids
        super().finish_requests(scheduler_output)  # type: ignore[misc]

    def gather_batch_req_state(self, scheduler_output: Any, dummy_run: bool) -> Any:
        """Plan the step once the batch is known, before a graph is picked for it."""
        gathered = super().gather_batch_req_state(scheduler_output, dummy_run)  # type: ignore[misc]
        batch = gathered[0]
        if batch is None:
            self.pedro_model.clear_step()
            return gathered
        if self.pedro.has_requests:  # no scheduler made the steps that warm the runner up
            self.pedro.assign(wire.assignments_of(scheduler_output))
        self.pedro_model.prepare_step(
            batch.req_ids,
            batch.num_scheduled_tokens,
            self.req_states.num_computed_tokens_np[batch.idx_mapping_np],
        )
        return gathered

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        original = partial(super().execute_model, **kwargs)  # type: ignore[misc]
        return execute(self.pedro, original, scheduler_output, *args)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_report(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def pool(self) -> Any:
        """What a pooling model does in place of sampling."""
        return self._with_report(super().pool())  # type: ignore[misc]

    def _with_report(self, output: Any) -> Any:
        if not reports():
            report_of_step(self.pedro)
        elif output is not None:
            wire.put_report(output, report_of_step(self.pedro))
        return output
