"""Both model runners' glue over one table of steps, with fakes for what needs a GPU.

The V1 runner also serves the engines of all other tests here. The V2 runner needs a GPU, so what is
PEDRO's of it runs on stand-ins; where vLLM's own code does not launch kernels, it is the real one.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from step_cases import CASES, PROMPTS, SLOTS
from stored import stored

from vllm_pedro.adapter import init_adapter
from vllm_pedro.config import TARGET_MODULES, BackboneShape, PedroConfig
from vllm_pedro.errors import AdapterError
from vllm_pedro.integration.patches import become
from vllm_pedro.integration.runner_v1 import PedroRunnerV1Mixin
from vllm_pedro.integration.runner_v2 import (
    PedroGraphsMixin,
    PedroModelStateMixin,
    PedroRunnerV2Mixin,
)
from vllm_pedro.integration.scheduler import ASSIGNMENTS
from vllm_pedro.serving.adapters import AdapterBank, AdapterLimits, HostCache
from vllm_pedro.serving.runtime import PedroRuntime
from vllm_pedro.serving.slots import Assignment
from vllm_pedro.serving.spec import EXTRA_ARGS_KEY, RequestSpec
from vllm_pedro.serving.vectors import VectorStore

SHAPE = BackboneShape(2, 8, {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 16, "up_proj": 16})
LIMITS = AdapterLimits(SHAPE, 4)
CPU = torch.device("cpu")


def make_runtime(gone=()):
    """A runtime whose adapters come from memory, except those in ``gone``."""

    def load(path, shape, expected_digest, check):
        if expected_digest in gone:
            raise AdapterError(f"{path} is gone")
        return stored(init_adapter(PedroConfig(r=2), SHAPE, seed=1))

    store = VectorStore(SHAPE, TARGET_MODULES, 4, 64, torch.float32, CPU)
    bank = AdapterBank(2, LIMITS, store.columns, CPU)
    return PedroRuntime(HostCache(4, LIMITS, load), bank, store)


def new_request(request_id):
    """``NewRequestData`` as far as the glue reads it."""
    extra = None
    if request_id in PROMPTS:
        digest, length = PROMPTS[request_id]
        spec = RequestSpec(digest, f"/{digest}", digest, length, request_id)
        extra = {EXTRA_ARGS_KEY: spec.to_wire()}
    return SimpleNamespace(req_id=request_id, sampling_params=SimpleNamespace(extra_args=extra))


def scheduled(rows, made=(), **more):
    """``SchedulerOutput``: all rows enter in this step."""
    names = [r.request_id for r in rows]
    output = SimpleNamespace(
        finished_req_ids=set(),
        preempted_req_ids=set(),
        scheduled_new_reqs=[new_request(n) for n in names],
        num_scheduled_tokens={r.request_id: r.num_tokens for r in rows},
        rows=rows,
    )
    assignments = {n: Assignment(SLOTS[n], n not in made, 1) for n in names if n in PROMPTS}
    setattr(output, ASSIGNMENTS, assignments)
    for name, value in more.items():
        setattr(output, name, value)
    return output


class Launches:
    """What a forward pass would have found, in the order of events."""

    def record(self, pedro, graph):
        self.graphs.append(graph)
        self.steps.append(pedro.store.step.tolist())


class FakeV1(Launches):
    """The methods of the V1 ``GPUModelRunner`` that PEDRO extends, in its order of calls."""

    def __init__(self):
        self.graphs, self.steps = [], []

    def _update_states(self, scheduler_output):
        rows = scheduler_output.rows
        # Spare places at the end, as in the real batch.
        self.input_batch = SimpleNamespace(
            req_ids=[r.request_id for r in rows],
            num_computed_tokens_cpu=np.array([*(r.num_computed for r in rows), 99], np.int32),
        )

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        return "prepared"

    def _determine_batch_execution_and_padding(self, *, force_eager=False):
        return "none" if force_eager else "full"

    def execute_model(self, scheduler_output):
        self._update_states(scheduler_output)
        counts = np.array([r.num_tokens for r in scheduler_output.rows], np.int32)
        assert self._prepare_inputs(scheduler_output, counts) == "prepared"
        self.record(self.pedro, self._determine_batch_execution_and_padding())

    def _dummy_run(self):
        self.record(self.pedro, "dummy")

    def sample_tokens(self):
        return SimpleNamespace(_model_runner_output=SimpleNamespace())


class FakeModelState:
    def __init__(self):
        self.calls = []

    def add_request(self, req_index, new_req_data):
        self.calls.append(("add", new_req_data.req_id))

    def remove_request(self, req_id):
        self.calls.append(("remove", req_id))

    def prepare_dummy_inputs(self, num_reqs, num_tokens):
        return {}


class FakeV2(Launches):
    """The same of the V2 runner, whose rows keep their index while they are in the batch."""

    def __init__(self):
        self.graphs, self.steps = [], []
        self.model_state = FakeModelState()
        self.cudagraph_manager = graph_manager()
        self.req_states = SimpleNamespace(num_computed_tokens_np=np.zeros(16, np.int32))

    def gather_batch_req_state(self, scheduler_output, dummy_run):
        if dummy_run:
            return None, 1
        rows = scheduler_output.rows
        # Rows of a batch lie scattered over the request states.
        index = np.array([15 - 2 * i for i in range(len(rows))], np.intp)
        self.req_states.num_computed_tokens_np[index] = [r.num_computed for r in rows]
        batch = SimpleNamespace(
            req_ids=[r.request_id for r in rows],
            num_scheduled_tokens=np.array([r.num_tokens for r in rows], np.int32),
            idx_mapping_np=index,
        )
        return batch, 1

    def finish_requests(self, scheduler_output):
        for name in scheduler_output.finished_req_ids | scheduler_output.preempted_req_ids:
            self.model_state.remove_request(name)

    def execute_model(self, scheduler_output, dummy_run=False):
        if not dummy_run:
            self.finish_requests(scheduler_output)
            for index, new in enumerate(scheduler_output.scheduled_new_reqs):
                self.model_state.remove_request(new.req_id)
                self.model_state.add_request(index, new)
        self.gather_batch_req_state(scheduler_output, dummy_run)
        graph = self.cudagraph_manager.dispatch(2, 2, 1, 0, max_query_len=1)
        self.record(self.pedro, graph.cg_mode.name.lower())

    def _dummy_run(self):
        self.execute_model(None, dummy_run=True)

    def sample_tokens(self):
        return SimpleNamespace(model_runner_output=SimpleNamespace())


def graph_manager():
    """vLLM's own, with one captured graph: a decode step of two rows."""
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

    manager = object.__new__(CudaGraphManager)
    manager._graphs_captured = True
    manager._resolve_effective_loras = lambda count: count
    graph = BatchExecutionDescriptor(
        cg_mode=CUDAGraphMode.FULL, num_tokens=2, num_reqs=2, uniform_token_count=1
    )
    manager._candidates = {(2, 0): [graph]}
    return manager


def v1(runtime):
    runner = FakeV1()
    runner.pedro = runtime
    become(runner, PedroRunnerV1Mixin)
    return runner


def v2(runtime):
    runner = FakeV2()
    runner.pedro = runtime
    become(runner, PedroRunnerV2Mixin)
    become(runner.model_state, PedroModelStateMixin)
    become(runner.cudagraph_manager, PedroGraphsMixin)
    runner.model_state.pedro = runner.cudagraph_manager.pedro = runtime
    return runner


RUNNERS = pytest.mark.parametrize("make", [v1, v2], ids=["v1", "v2"])


@RUNNERS
@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_same_in_both_runners(make, name):
    rows, made, segments, prefills = CASES[name]
    runner = make(make_runtime())
    runner.execute_model(scheduled(rows, made))
    plan, store = runner.pedro.plan, runner.pedro.store
    assert plan.segments == segments
    assert plan.prefills == prefills
    slots = [0] * 64
    for s in segments:
        slots[s.start : s.start + s.length] = [s.slot] * s.length
    assert store.token_slots.tolist() == slots
    assert store.step.tolist() == [len(prefills), len(segments)]
    rows_made = {tuple(p[:3]) for p in store.prompts[: len(prefills)].tolist()}
    assert rows_made == {(p.start, p.length, p.slot) for p in prefills}
    # The heart of it: a step that makes vectors replays no graph, however much it looks like one.
    assert runner.graphs == ["none" if prefills else "full"]


@RUNNERS
def test_a_request_s_life(make):
    rows = {n: CASES[n][0] for n in ("whole prompt", "decode")}
    runner = make(make_runtime())
    runner.execute_model(scheduled(rows["whole prompt"]))
    assert runner.pedro.makes_vectors
    later = scheduled(rows["decode"], scheduled_new_reqs=[])
    delattr(later, ASSIGNMENTS)
    runner.execute_model(later)
    assert not runner.pedro.makes_vectors
    assert runner.graphs == ["none", "full"]
    assert runner.pedro.store.token_slots[0] == SLOTS["a"]
    # Another row's step, in which it has ended: nothing of it is left.
    end = scheduled(CASES["base row"][0], finished_req_ids={"a"})
    runner.execute_model(end)
    assert runner.pedro.slot_of("a") == 0
    assert not runner.pedro.store.token_slots.any()


@RUNNERS
def test_a_preempted_request_makes_its_vectors_again(make):
    runner = make(make_runtime())
    rows = CASES["whole prompt"][0]
    runner.execute_model(scheduled(rows))
    runner.execute_model(scheduled(CASES["base row"][0], preempted_req_ids={"a"}))
    # V2 gets it as a new request; V1 keeps it and hears of its row alone.
    more = {} if make is v2 else {"scheduled_new_reqs": []}
    runner.execute_model(scheduled(CASES["resumed after preemption, outputs included"][0], **more))
    assert [p.length for p in runner.pedro.plan.prefills] == [5]
    assert runner.graphs == ["none", "full", "none"]


@RUNNERS
def test_a_preempted_request_keeps_an_adapter_that_was_unloaded(make):
    """Its folder may be gone by then; once the request has ended, so is the adapter."""
    gone = set()
    runner = make(make_runtime(gone))
    rows, resumed = CASES["whole prompt"][0], "resumed after preemption, outputs included"
    runner.execute_model(scheduled(rows))
    digest = PROMPTS["a"][0]
    gone.add(digest)
    runner.execute_model(scheduled(CASES["base row"][0], preempted_req_ids={"a"}))
    runner.pedro.retire(digest)
    more = {} if make is v2 else {"scheduled_new_reqs": []}
    runner.execute_model(scheduled(CASES[resumed][0], **more))
    assert not runner.pedro.failed
    assert [p.length for p in runner.pedro.plan.prefills] == [5]
    assert len(runner.pedro.host) == 1
    # Preempted once more, and aborted there.
    runner.execute_model(scheduled(CASES["base row"][0], preempted_req_ids={"a"}))
    assert len(runner.pedro.host) == 1
    runner.execute_model(scheduled(CASES["base row"][0], finished_req_ids={"a"}))
    assert len(runner.pedro.host) == 0


@RUNNERS
def test_dummy_runs_and_captures_touch_no_row(make):
    runner = make(make_runtime())
    runner.execute_model(scheduled(CASES["mixed batch"][0], ["a"]))
    runner._dummy_run()
    assert not runner.pedro.store.token_slots.any()
    assert runner.steps[-1] == [0, 0]
    assert not runner.pedro.makes_vectors
    runner.execute_model(scheduled(CASES["mixed batch"][0], ["a"]))
    if make is v2:
        runner.model_state.prepare_dummy_inputs(2, 2)  # before a capture
        assert not runner.pedro.makes_vectors
        assert not runner.pedro.store.token_slots.any()


@RUNNERS
def test_an_adapter_that_is_gone_fails_its_own_request(make):
    runner = make(make_runtime(gone={"B"}))
    runner.execute_model(scheduled(CASES["mixed batch"][0], ["a"]))
    output = runner.sample_tokens()
    target = output.__dict__.popitem()[1]
    assert list(target.pedro_failed) == ["b"]
    assert [s.slot for s in runner.pedro.plan.segments] == [SLOTS["a"], SLOTS["c"]]
    assert not hasattr(runner.sample_tokens().__dict__.popitem()[1], "pedro_failed")


def test_without_captured_graphs_the_dispatch_is_vllm_s_own():
    runner = v2(make_runtime())
    runner.cudagraph_manager._graphs_captured = False
    runner.execute_model(scheduled(CASES["decode"][0], ["a"]))
    assert runner.graphs == ["none"]
