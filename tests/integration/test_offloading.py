"""KV blocks that are moved out of the device and back in, by the connectors that are served."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
from offloading import offloading
from simple_offloading import copies_on_the_cpu, simple_offloading

from vllm_pedro import PedroRequest
from vllm_pedro.integration.offloading import Offloading

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("late_reads")]

BLOCK = 32


def tokens(count, seed=0):
    return [(7 * i * i + 3 * i + 11 * seed) % 128 for i in range(count)]


def both():
    """Blocks are stored by both, and loaded by the first that has them."""
    from vllm.config import KVTransferConfig

    children = [simple_offloading(), offloading()]
    names = ("kv_connector", "kv_role", "kv_connector_extra_config")
    listed = [{name: getattr(child, name) for name in names} for child in children]
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": listed},
    )


CONNECTORS = {
    "offloading": offloading,
    "simple": simple_offloading,
    "lazy": lambda: simple_offloading(lazy_offload=True),
    "both": both,
}


OFTEN = {"offloading", "simple"}
"""The others are of the same code; they are run with `-m slow`, on V1."""


@pytest.fixture
def start(tiny_engine):
    @contextlib.contextmanager
    def start(connector="offloading"):
        with copies_on_the_cpu(), tiny_engine(
            kv_transfer_config=CONNECTORS[connector](), block_size=BLOCK,
            num_gpu_blocks_override=9, enable_prefix_caching=True, max_num_batched_tokens=512,
        ) as llm:  # fmt: skip
            yield llm

    return start


@pytest.fixture
def adapters(tiny, write_adapter):
    def make(seed, **config):
        return write_adapter(tiny, seed=seed, scale=0.2, down_scale=15.0, **config)

    return {
        "last": make(1), "mean": make(2, pooling="mean"),
        "answer": make(3, scope="answer"), "other answer": make(4, scope="answer"),
        "static": make(5, r=0),
    }  # fmt: skip


class Asker:
    """Asks an engine, compares with the reference, and tells how many tokens were loaded."""

    def __init__(self, llm, oracle, adapters, connector):
        self.llm, self.oracle, self.adapters = llm, oracle, adapters
        self.is_lazy = connector == "lazy"

    def loads(self, least, *asked, most=None):
        """It loads so many tokens; a lazy connector what it had the time to store of them."""
        assert (0 if self.is_lazy else least) <= self(*asked) <= (most or least)

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


def scenario(start, oracle, adapters, connector="offloading"):
    prompt = tokens(150)
    with start(connector) as llm:
        ask = Asker(llm, oracle, adapters, connector)
        for name in (None, "last", "mean", "answer", "static"):
            ask(prompt, name)
        ask.forget()
        ask.loads(128, prompt)
        ask.forget()
        ask.loads(128, prompt, "last")
        ask.forget()
        ask.loads(0, prompt, "mean")
        ask.forget()
        ask.loads(128, prompt, "answer")
        # Static vectors hang on no prompt, and neither do their tenant's blocks.
        ask.forget()
        ask.loads(128, prompt[:140] + tokens(9, 5), "static")
        # Blocks before the pooled token are the backbone's, whoever computed them.
        ask.forget()
        ask.loads(128, prompt, "other answer")
        shared = tokens(130, 7)
        ask(shared, "answer")
        ask.forget()
        ask.loads(128, shared + tokens(9, 8))
        ask.forget()
        ask.loads(128, shared + tokens(12, 9), "other answer")
        # A later turn with the first one's vectors, which are gone: up to the pooled token.
        later = prompt + tokens(40, 3)
        ask(later, "last", 70)
        ask(later, "mean", 70)
        ask(later, "answer", 70)
        ask.forget()
        ask.loads(64, later, "last", 70, most=69)
        ask.forget()
        ask.loads(0, later, "mean", 70)
        ask.forget()
        ask.loads(64, later, "answer", 70, most=69)


def adapter_that_was_away(start, oracle, adapters, connector="offloading"):
    """What was computed without vectors is not stored, neither at once nor when it ends."""
    folder = adapters["last"]
    away = folder.with_name(folder.name + "-away")
    prompt = tokens(150, 20)
    with start(connector) as llm:
        ask = Asker(llm, oracle, adapters, connector)
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
        ask.loads(128, prompt, "last")


@pytest.mark.parametrize(
    "connector",
    [
        pytest.param(name, marks=pytest.mark.both_runners if name in OFTEN else pytest.mark.slow)
        for name in CONNECTORS
    ],
)
@pytest.mark.parametrize("scene", [scenario, adapter_that_was_away], ids=lambda s: s.__name__)
def test_loaded_blocks_are_those_that_were_computed(scene, connector, start, tiny_oracle, adapters):
    scene(start, tiny_oracle, adapters, connector)


@pytest.mark.both_runners
@pytest.mark.parametrize("connector", ["offloading", "simple"])
def test_without_the_limit_on_loads(connector, start, tiny_oracle, adapters, monkeypatch):
    monkeypatch.setattr("vllm_pedro.integration.offloading.loadable", lambda *args: None)
    with pytest.raises((AssertionError, RuntimeError)):
        scenario(start, tiny_oracle, adapters, connector)


@pytest.mark.both_runners
def test_without_holding_stores_back(start, tiny_oracle, adapters, monkeypatch):
    monkeypatch.setattr(Offloading, "hold", lambda self, request: None)
    with pytest.raises(AssertionError):
        adapter_that_was_away(start, tiny_oracle, adapters)


def test_simple_offloading_is_offered_no_blocks_of_unknown_vectors():
    """In steps that are under way at once it would store them: they count as computed."""

    class SimpleCPUOffloadConnector:
        def __init__(self):
            self.scheduler_manager = SimpleNamespace(
                get_num_new_matched_tokens=None,
                cpu_coordinator=SimpleNamespace(find_longest_cache_hit=None),
                group_block_sizes=(BLOCK, 2 * BLOCK),
                _select_eager_blocks_to_store=lambda state, block_ids: block_ids,
            )

    connector = SimpleCPUOffloadConnector()
    offloading = Offloading(connector)
    select = connector.scheduler_manager._select_eager_blocks_to_store
    request = SimpleNamespace(request_id="0", pedro=SimpleNamespace(first_scaled=0))
    state, blocks = SimpleNamespace(request=request), ([1, 2, 3, 4], [5, 6])
    assert select(state, blocks) == blocks
    offloading.hold(request)
    assert select(state, blocks) == ([], [])
    request.pedro.first_scaled = 3 * BLOCK  # of scope "answer"
    offloading.hold(request)
    assert select(state, blocks) == ([1, 2, 3], [5])
    offloading.release("0")
    assert select(state, blocks) == blocks
