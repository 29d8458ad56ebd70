"""What training loops do to an engine: adapters from memory, new backbone weights, pauses."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from engines import Oracle, make_tiny_model
from scenarios import Queue, check_all, greedy, tokens

from vllm_pedro.adapter import load_adapter
from vllm_pedro.adapter.memory import SHARED_MEMORY

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


@pytest.fixture(scope="module")
def other_tiny(tmp_path_factory):
    """A model of the same shape with other weights, as after a step of training."""
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=5)


@pytest.fixture(scope="module")
def other_oracle(other_tiny):
    return Oracle(other_tiny, keep=64)


@pytest.fixture(scope="module")
def rows(tiny, tiny_adapters, write_adapter):
    """Each kind of adapter, and none."""
    answer = write_adapter(tiny, seed=6, scale=0.2, down_scale=15.0, scope="answer")
    adapters = [tiny_adapters["last"], tiny_adapters["mean"], tiny_adapters["static"], answer, None]
    return [(tokens(40 + i, i), adapter, None) for i, adapter in enumerate(adapters)]


def ask(llm, rows):
    from vllm_pedro import PedroRequest

    requests = [a and PedroRequest(a.name, i, str(a)) for i, (_, a, _) in enumerate(rows, 1)]
    prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in rows]
    return llm.generate(prompts, greedy(), lora_request=requests, use_tqdm=False)


def test_an_adapter_is_handed_over_as_tensors_at_every_step(
    tiny_engine, tiny_oracle, tiny_adapters
):
    from vllm_pedro import PedroRequest

    with tiny_engine(enable_prefix_caching=True) as llm:
        prompt = tokens(40)
        for name in ("last", "mean", "other", "last"):
            adapter = load_adapter(tiny_adapters[name])
            request = PedroRequest.from_tensors("policy", 1, adapter.config, adapter.tensors)
            adapter.tensors.clear()  # the values were copied
            folder = Path(request.lora_path)
            assert folder.parent.parent == Path(SHARED_MEMORY)
            assert folder.is_dir()
            outputs = llm.generate(
                {"prompt_token_ids": prompt}, greedy(), lora_request=request, use_tqdm=False
            )
            check_all(tiny_oracle, [(prompt, tiny_adapters[name], None)], outputs)
            del request, outputs  # which have it too
            gc.collect()
            assert not folder.exists()


def test_new_weights_of_the_backbone(
    scheduling, tiny, other_tiny, tiny_engine, tiny_oracle, other_oracle, rows
):
    with tiny_engine(max_pedros=None, enable_prefix_caching=True, **scheduling) as llm:
        for model, oracle in ((tiny, tiny_oracle), (other_tiny, other_oracle), (tiny, tiny_oracle)):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model)})
            assert llm.reset_prefix_cache()
            for _ in range(2):
                check_all(oracle, rows, ask(llm, rows))


def test_a_reset_sends_running_requests_back(scheduling, tiny_engine, tiny_oracle, rows):
    with tiny_engine(max_pedros=None, enable_prefix_caching=True, **scheduling) as llm:
        queue = Queue(llm, tiny_oracle)
        for number, (prompt, adapter, _) in enumerate(rows):
            queue.add(str(number), prompt, adapter, max_tokens=12)
        for _ in range(3):
            queue.step(4)
            assert llm.reset_prefix_cache(reset_running_requests=True)
        queue.finish()


def test_running_requests_go_on_with_new_weights(
    scheduling, other_tiny, tiny_engine, tiny_oracle, other_oracle, rows
):
    """From where they are: their vectors and KV become the new weights', their tokens stay."""
    from vllm_pedro.model.reference import NEAR_TIE_MARGIN

    with tiny_engine(max_pedros=None, enable_prefix_caching=True, **scheduling) as llm:
        queue = Queue(llm, tiny_oracle)
        for number, (prompt, adapter, _) in enumerate(rows):
            queue.add(str(number), prompt, adapter, max_tokens=12)
        queue.step(6)
        assert llm.reset_prefix_cache(reset_running_requests=True)
        heads = {n: list(output.outputs[0].token_ids) for n, output in queue.outputs.items()}
        assert len(heads) == len(rows)
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other_tiny)})
        assert llm.reset_prefix_cache(reset_running_requests=True)
        while queue.engine.has_unfinished_requests():
            queue.step()
    for name, head in heads.items():
        output = queue.outputs[name]
        found = list(output.outputs[0].token_ids)
        assert found[: len(head)] == head
        assert len(found) == 12
        reference = other_oracle.score(list(output.prompt_token_ids), found, queue.adapters[name])
        for step in range(len(head), 12):
            if reference.margins[step] < NEAR_TIE_MARGIN:
                break
            assert found[step] == reference.greedy[step], (name, step)


def test_pauses_and_sleep(scheduling, tiny_engine, tiny_oracle, rows):
    """On the CPU vLLM's levels 1 and 2 only drop caches and requests."""
    with tiny_engine(max_pedros=None, enable_prefix_caching=True, **scheduling) as llm:
        queue = Queue(llm, tiny_oracle)
        for number, (prompt, adapter, _) in enumerate(rows):
            queue.add(str(number), prompt, adapter, max_tokens=8)
        queue.step(3)
        for clear_cache in (False, True):
            core = llm.llm_engine.engine_core.engine_core
            core.pause_scheduler(mode="keep", clear_cache=clear_cache)
            queue.step(2)
            core.resume_scheduler()
            queue.step(2)
        queue.finish()
        for level in (0, 1, 2):
            llm.sleep(level=level)
            llm.wake_up()
            check_all(tiny_oracle, rows, ask(llm, rows))
