"""Schedules that once went wrong, each reduced to the fewest requests that show it."""

from __future__ import annotations

import shutil

import pytest
import schedule_fuzz
from runners import current_runner

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


def test_abort_in_the_step_that_fails_leaves_nothing_behind(
    tiny, tiny_engine, tiny_oracle, write_adapter, late_reads
):
    """A prompt whose adapter could not be had, aborted before its step's output is processed.

    Its KV blocks and its row of the vector store were never right, so neither may serve the next
    request with this adapter and prompt. A server takes aborts in during every step: they wait in
    the engine core's queue, which is emptied between the forward pass and the scheduler's update.
    """
    from vllm import SamplingParams

    from vllm_pedro import PedroRequest

    adapter = write_adapter(tiny, seed=5, scale=0.2, down_scale=15.0)
    away = adapter.with_name(adapter.name + "-away")
    prompt = {"prompt_token_ids": [(7 * i * i + 3) % 128 for i in range(70)]}
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    request = PedroRequest("a", 1, str(adapter))
    with tiny_engine(enable_prefix_caching=True) as llm:
        engine = llm.llm_engine
        request_id = engine.add_request("0", prompt, params, lora_request=request)
        adapter.rename(away)
        engine.output_processor.abort_requests([request_id], internal=True)
        engine.engine_core.engine_core.aborts_queue.put_nowait([request_id])
        engine.step()
        away.rename(adapter)
        (output,) = llm.generate(prompt, params, lora_request=request, use_tqdm=False)
    tiny_oracle.check(output, adapter)


def without_eviction(patch):
    from vllm_pedro.integration.scheduler import PedroSchedulerMixin

    def preempt(self, request, *args, **kwargs):
        self._pedro_free(request)
        super(PedroSchedulerMixin, self)._preempt_request(request, *args, **kwargs)

    patch.setattr(PedroSchedulerMixin, "_preempt_request", preempt)


def test_blocks_of_a_step_that_never_ran_are_not_found(tmp_path, monkeypatch):
    """Priority scheduling preempts a request in the step that has already scheduled it.

    vLLM 0.32 leaves its new blocks in the prefix cache, though nothing was computed into them.
    """
    report = schedule_fuzz.run(tmp_path, 10, first=1660)
    assert not report.failures, schedule_fuzz.format_report(report)
    if current_runner() == "v1":  # where these cases once failed; V2 schedules them otherwise
        without_eviction(monkeypatch)
        assert schedule_fuzz.run(tmp_path, 10, first=1660, stop_at_failure=True).failures


def test_the_same_content_in_a_folder_that_is_gone_ends_its_own_requests_alone(
    tiny, tiny_engine, tiny_oracle, write_adapter, tmp_path, late_reads
):
    """Two tenants with equal adapters send one prompt, and the first one's folder is away."""
    from vllm import SamplingParams

    from vllm_pedro import PedroRequest

    for scope in ("sequence", "answer"):
        here = write_adapter(tiny, seed=5, scale=0.2, down_scale=15.0, scope=scope)
        gone = shutil.copytree(here, tmp_path / scope)
        prompts = [{"prompt_token_ids": [(7 * i * i + 3) % 128 for i in range(n)]} for n in (1, 40)]
        params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            outputs = {}
            with tiny_engine(enable_prefix_caching=True) as llm:
                engine = llm.llm_engine
                for number, path in enumerate((gone, here, gone, here)):
                    request = PedroRequest(path.name, number + 1, str(path))
                    engine.add_request(str(number), prompt, params, lora_request=request)
                away = gone.rename(tmp_path / "away")
                while engine.has_unfinished_requests():
                    outputs |= {output.request_id: output for output in engine.step()}
                away.rename(gone)
            reasons = [outputs[str(i)].outputs[0].finish_reason for i in range(4)]
            assert reasons == ["error", "length", "error", "length"]
            for number in (1, 3):
                tiny_oracle.check(outputs[str(number)], here)
