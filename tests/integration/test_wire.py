"""What rides on vLLM's own objects between its processes: every crossing, there and lost."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from scenarios import ask, greedy, tokens
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_pedro.integration import wire
from vllm_pedro.serving.rows import Assignment
from vllm_pedro.serving.spec import RequestSpec

SPEC = RequestSpec("name", "/folder", "digest", 3, "prompt", True, False)


def sent(value):
    """As vLLM's executors send the objects of a step."""
    return pickle.loads(pickle.dumps(value))


def test_a_spec_travels_beside_other_plugins_values():
    params = SamplingParams(extra_args={"other": 1})
    assert not wire.carries_spec(params)
    wire.put_spec(params, SPEC)
    assert wire.carries_spec(params)
    encoded = MsgpackEncoder().encode(params)
    arrived = MsgpackDecoder(SamplingParams).decode(encoded)
    assert wire.spec_of(arrived) == wire.spec_of(params.clone()) == SPEC
    assert arrived.extra_args["other"] == 1


@pytest.mark.parametrize("params", [None, SamplingParams(), SamplingParams(extra_args={"a": 1})])
def test_a_request_without_an_adapter_has_no_spec(params):
    assert wire.spec_of(params) is None
    assert not wire.carries_spec(params)


def test_assignments_arrive_and_their_loss_is_noticed():
    output = SchedulerOutput.make_empty()
    with pytest.raises(wire.WireError, match="without PEDRO's assignments"):
        wire.assignments_of(output)
    wire.put_assignments(output, {})
    assert wire.assignments_of(sent(output)) == {}
    wire.put_assignments(output, {"a": Assignment(2, True, 1)})
    assert wire.assignments_of(sent(output)) == {"a": Assignment(2, True, 1)}


def test_failures_go_from_stage_to_stage():
    from vllm.distributed.parallel_state import _split_tensor_dict
    from vllm.sequence import IntermediateTensors
    from vllm.v1.worker.gpu_worker import AsyncIntermediateTensors

    computed = IntermediateTensors({"hidden_states": torch.zeros(2, 4)})
    waited = []
    received = AsyncIntermediateTensors(
        dict(computed.tensors), comm_postprocess=[lambda: waited.append(True)]
    )
    assert wire.take_failures(received) == []
    assert not waited  # while nothing failed, the tensors come as the stage computes
    wire.hand_on_failures(computed, {"a": "gone", "b": "gone"})
    metadata, tensors = _split_tensor_dict(computed.tensors)
    received = AsyncIntermediateTensors(
        dict(zip([name for name, _ in metadata], tensors, strict=True))
    )
    assert wire.take_failures(received) == ["a", "b"]
    assert wire.take_failures(received) == []
    assert list(received.tensors) == ["hidden_states"]


def test_prefetches_arrive():
    output = SchedulerOutput.make_empty()
    assert wire.prefetches_of(output) == []
    spec = RequestSpec("a", "/a", "digest", 5, "prompt")
    wire.put_prefetches(output, [spec])
    assert wire.prefetches_of(sent(output)) == [spec]


def test_a_report_arrives_and_its_loss_is_noticed():
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    with pytest.raises(wire.WireError, match="without PEDRO's report"):
        wire.report_of(output)
    report = wire.StepReport({"a": "gone"}, {"hits": {"host": 1}}, {"digest": True}, ["other"])
    wire.put_report(output, report)
    assert wire.report_of(sent(output)) == report
    assert wire.report_of(copy.copy(output)) == report


@pytest.mark.parametrize("name", ["_model_runner_output", "model_runner_output"])
def test_an_asynchronous_output_takes_the_report_inside(name):
    inner = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    wire.put_report(SimpleNamespace(**{name: inner}), wire.StepReport({"a": "gone"}))
    assert wire.report_of(inner).failed == {"a": "gone"}


def test_a_step_without_tokens_has_a_report_too():
    """vLLM answers it with one object that all such steps share."""
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    report = wire.StepReport(loaded={"digest": True})
    assert wire.report_of(wire.with_report(output, report)) == report
    with pytest.raises(wire.WireError):
        wire.report_of(output)


def test_counts_are_taken_out_of_a_field_that_others_use():
    stats = SchedulerStats(ec_connector_stats={"other": 1})
    assert wire.take_stats(stats) is None
    wire.put_stats(stats, {"hits": {"host": 1}})
    assert wire.take_stats(stats) == {"hits": {"host": 1}}
    assert stats.ec_connector_stats == {"other": 1}
    assert wire.take_stats(SchedulerStats()) is None


def test_a_failure_is_told_from_other_errors():
    def output(completion):
        return SimpleNamespace(outputs=[completion])

    failed = SimpleNamespace(finish_reason="error", stop_reason=None)
    assert wire.failure_of(output(failed)) == ""
    wire.put_failure(failed, "the files changed")
    assert wire.failure_of(output(failed)) == "the files changed"
    stopped = SimpleNamespace(finish_reason="stop", stop_reason=failed.stop_reason)
    assert wire.failure_of(output(stopped)) == ""


def test_a_failed_pooling_request_is_told_by_its_code():
    from vllm.outputs import PoolingOutput, PoolingRequestOutput, RequestError

    def output(error):
        return PoolingRequestOutput("0", PoolingOutput(torch.empty(0)), [], 0, True, error=error)

    assert wire.failure_of(output(None)) == ""
    assert wire.failure_of(output(RequestError("multimodal_cache_miss", "gone"))) == ""
    assert wire.failure_of(output(RequestError(wire.KEY, "changed"))) == "changed"


@pytest.mark.engine
@pytest.mark.both_runners
@pytest.mark.parametrize("lost", ["assignments", "report"])
def test_what_is_lost_on_the_way_stops_the_engine(lost, tiny_engine, tiny_adapters, monkeypatch):
    """Rather than answer with other vectors than the request's."""
    monkeypatch.setattr(wire, f"put_{lost}", lambda *args: None)
    with tiny_engine() as llm, pytest.raises(wire.WireError, match=f"without PEDRO's {lost}"):
        ask(llm, [(tokens(5), tiny_adapters["last"], None)], greedy(2))
