"""KV blocks that are moved out of the device and back in, by vLLM's OffloadingConnector."""

from __future__ import annotations

import pytest
from offloading import offloading

from vllm_pedro import PedroRequest
from vllm_pedro.integration.offloading import Offloading

pytestmark = [
    pytest.mark.engine,
    pytest.mark.both_runners,
    pytest.mark.usefixtures("late_reads"),
]

BLOCK = 32


def tokens(count, seed=0):
    return [(7 * i * i + 3 * i + 11 * seed) % 128 for i in range(count)]


@pytest.fixture
def start(tiny_engine):
    def start():
        return tiny_engine(
            kv_transfer_config=offloading(), block_size=BLOCK, num_gpu_blocks_override=9,
            enable_prefix_caching=True, max_num_batched_tokens=512,
        )  # fmt: skip

    return start


@pytest.fixture
def adapters(tiny, write_adapter):
    def make(seed, **config):
        return write_adapter(tiny, seed=seed, scale=0.2, down_scale=15.0, **config)

    return {
        "last": make(1), "mean": make(2, pooling="mean"),
        "answer": make(3, scope="answer"), "other answer": make(4, scope="answer"),
    }  # fmt: skip


class Asker:
    """Asks an engine, compares with the reference, and tells how many tokens were loaded."""

    def __init__(self, llm, oracle, adapters):
        self.llm, self.oracle, self.adapters = llm, oracle, adapters

    def __call__(self, prompt, name=None, length=None, fails=False):
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
        path = self.adapters.get(name)
        request = path and PedroRequest(name, 1, str(path), prompt_length=length)
        (output,) = self.llm.generate(
            {"prompt_token_ids": prompt}, params, lora_request=request, use_tqdm=False
        )
        if fails:
            assert output.outputs[0].finish_reason == "error"
        else:
            self.oracle.check(output, path, length)
        return output.num_cached_tokens or 0

    def forget(self):
        """Put all blocks out of the device, and the vectors of all prompts."""
        for seed in range(50, 58):
            self(tokens(250, seed), "last" if seed % 2 else "answer")


def scenario(start, oracle, adapters):
    prompt = tokens(150)
    with start() as llm:
        ask = Asker(llm, oracle, adapters)
        for name in (None, "last", "mean", "answer"):
            ask(prompt, name)
        ask.forget()
        assert ask(prompt) == 128
        ask.forget()
        assert ask(prompt, "last") == 128
        ask.forget()
        assert ask(prompt, "mean") == 0
        ask.forget()
        assert ask(prompt, "answer") == 128
        # Blocks before the pooled token are the backbone's, whoever computed them.
        ask.forget()
        assert ask(prompt, "other answer") == 128
        shared = tokens(130, 7)
        ask(shared, "answer")
        ask.forget()
        assert ask(shared + tokens(9, 8)) == 128
        ask.forget()
        assert ask(shared + tokens(12, 9), "other answer") == 128
        # A later turn with the first one's vectors, which are gone: up to the pooled token.
        later = prompt + tokens(40, 3)
        ask(later, "last", 70)
        ask(later, "mean", 70)
        ask(later, "answer", 70)
        ask.forget()
        assert 64 <= ask(later, "last", 70) <= 69
        ask.forget()
        assert ask(later, "mean", 70) == 0
        ask.forget()
        assert 64 <= ask(later, "answer", 70) <= 69


def adapter_that_was_away(start, oracle, adapters):
    """What was computed without vectors is not stored, neither at once nor when it ends."""
    folder = adapters["last"]
    away = folder.with_name(folder.name + "-away")
    prompt = tokens(150, 20)
    with start() as llm:
        ask = Asker(llm, oracle, adapters)
        core = llm.llm_engine.engine_core.engine_core
        request = PedroRequest("last", 1, str(folder))
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request("0", {"prompt_token_ids": prompt}, params, lora_request=request)
        folder.rename(away)
        outputs = []
        while llm.llm_engine.has_unfinished_requests():
            outputs += llm.llm_engine.step()
        away.rename(folder)
        assert outputs[-1].outputs[0].finish_reason == "error"
        assert core.scheduler.connector is not None
        ask.forget()
        ask(prompt, "last")
        ask.forget()
        assert ask(prompt, "last") == 128


@pytest.mark.parametrize("scene", [scenario, adapter_that_was_away], ids=lambda s: s.__name__)
def test_loaded_blocks_are_those_that_were_computed(scene, start, tiny_oracle, adapters):
    scene(start, tiny_oracle, adapters)


def test_without_the_limit_on_loads(start, tiny_oracle, adapters, monkeypatch):
    monkeypatch.setattr("vllm_pedro.integration.offloading.loadable", lambda *args: None)
    with pytest.raises((AssertionError, RuntimeError)):
        scenario(start, tiny_oracle, adapters)


def test_without_holding_stores_back(start, tiny_oracle, adapters, monkeypatch):
    monkeypatch.setattr(Offloading, "hold", lambda self, request: None)
    with pytest.raises(AssertionError):
        adapter_that_was_away(start, tiny_oracle, adapters)
