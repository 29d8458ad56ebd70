"""A prompt that does not fit a step holds nobody up, and starts within a few steps itself."""

from __future__ import annotations

import pytest
from runners import current_runner
from scenarios import Queue, greedy, tokens

from vllm_pedro.serving.admission import PATIENCE

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]

# V2 takes a policy each, as its steps take long here.
V2 = current_runner() == "v2"
POLICIES = pytest.mark.parametrize(
    "policy",
    [
        {"scheduling_policy": "fcfs", "async_scheduling": V2},
        {"scheduling_policy": "priority", "async_scheduling": False},
    ],
    ids=["async-fcfs" if V2 else "sync-fcfs", "sync-priority"],
)


def queue_of_the_long_prompt(start, oracle, adapter, **settings):
    """Four rows decode; then a prompt of 95 tokens comes in, and six of 5 tokens behind it."""
    with start(
        max_num_batched_tokens=96, max_num_seqs=16, enable_prefix_caching=False, **settings
    ) as llm:
        queue = Queue(llm, oracle)
        if adapter is not None:
            queue.load(adapter)
        for i in range(4):
            queue.add(f"row {i}", tokens(10, i), max_tokens=4 * PATIENCE + 12)
        queue.step(3)
        came = queue.step_number
        queue.add("long", tokens(95, 9), adapter)
        for i in range(6):
            queue.add(f"short {i}", tokens(5, 20 + i))
        first = queue.finish()
    return {name: step - came for name, step in first.items() if name[:4] not in ("row ", "load")}


@POLICIES
def test_prompts_behind_one_that_does_not_fit_start_at_once(
    policy, tiny_engine, tiny_oracle, tiny_adapters
):
    base, pedro = (
        queue_of_the_long_prompt(tiny_engine, tiny_oracle, adapter, **policy)
        for adapter in (None, tiny_adapters["last"])
    )
    for i in range(6):
        assert pedro[f"short {i}"] <= base[f"short {i}"] + 5
    assert pedro["long"] <= PATIENCE + 3


@POLICIES
def test_a_tenant_without_a_slot_delays_nobody(policy, tiny_engine, tiny_oracle, tiny_adapters):
    names = ["last", "mean", "other", "max"]
    with tiny_engine(max_pedros=1, **policy) as llm:
        queue = Queue(llm, tiny_oracle)
        queue.load(*(tiny_adapters[name] for name in names))
        for i, name in enumerate(names):
            queue.add(name, tokens(20, i), tiny_adapters[name])
        queue.add("again", tokens(21), tiny_adapters["last"])
        queue.add("base", tokens(9))
        first = queue.finish()
    assert first["last"] == first["again"] == first["base"]
    assert [first[name] - first["last"] for name in names] == [0, 1, 2, 3]


def test_adapters_of_one_step_fit_the_device(scheduling, tiny_engine, tiny_oracle, tiny_adapters):
    """By their bytes: with room for the largest alone, some go together and some do not."""
    names = ("last", "mean", "other", "max", "static")
    sizes = {name: tiny_oracle.adapter_bytes(tiny_adapters[name]) for name in names}
    memory = max(sizes.values())
    with tiny_engine(max_pedros=None, pedro_memory_bytes=memory, **scheduling) as llm:
        queue = Queue(llm, tiny_oracle)
        for i, name in enumerate(sizes):
            queue.add(name, tokens(20, i), tiny_adapters[name])
        first = queue.finish()
    for step in set(first.values()):
        assert sum(size for name, size in sizes.items() if first[name] == step) <= memory
    assert len(set(first.values())) > 1


def test_an_adapter_that_never_fits_is_refused(tiny_engine, tiny_adapters):
    from vllm_pedro import PedroRequest

    with tiny_engine(pedro_memory_bytes=4096) as llm:
        request = PedroRequest("x", 1, str(tiny_adapters["last"]))
        with pytest.raises(ValueError, match=r"has 4096 for adapters: start it .*memory-bytes \d+"):
            llm.generate([{"prompt_token_ids": tokens(9)}], greedy(1), lora_request=request)


def test_a_stream_of_prompts_does_not_starve_one_that_needs_a_whole_step(
    scheduling, tiny_engine, tiny_oracle, tiny_adapters
):
    """Base prompts that fill every step keep coming."""
    with tiny_engine(
        max_num_batched_tokens=64, max_num_seqs=8, enable_prefix_caching=False, **scheduling
    ) as llm:
        queue = Queue(llm, tiny_oracle)
        queue.add("first", tokens(200, 1), max_tokens=2)
        queue.step()
        came = queue.step_number
        queue.add("long", tokens(64, 9), tiny_adapters["last"])
        for i in range(10):
            queue.add(f"base {i}", tokens(150, 10 + i), max_tokens=2)
            queue.step()
        first = queue.finish()
    assert first["long"] - came <= 3 * PATIENCE < first["base 9"] - came - 5


def test_what_cannot_start_for_want_of_blocks_lets_others_get_on(
    scheduling, tiny_engine, tiny_oracle, tiny_adapters
):
    """Its turn comes and goes; the running rows that hold the blocks finish."""
    with tiny_engine(
        max_num_batched_tokens=96, num_gpu_blocks_override=9, max_num_seqs=4,
        enable_prefix_caching=False, **scheduling,
    ) as llm:  # fmt: skip
        queue = Queue(llm, tiny_oracle)
        for i in range(3):
            queue.add(f"row {i}", tokens(50, i), max_tokens=14)
        queue.step(2)
        queue.add("long", tokens(95, 9), tiny_adapters["mean"])
        first = queue.finish()
    assert first["long"] <= 14 + 2 * PATIENCE + 6


def without_passing_over(patch):
    from vllm_pedro.serving.admission import Admission

    patch.setattr(Admission, "left", property(lambda self: 1 << 30))


def without_a_turn(patch):
    from vllm_pedro.serving.admission import Admission

    patch.setattr(Admission, "candidates", lambda self: [])


@pytest.mark.parametrize("mutate", [without_passing_over, without_a_turn], ids=lambda f: f.__name__)
def test_each_half_is_needed(mutate, tiny_engine, tiny_oracle, tiny_adapters, monkeypatch):
    mutate(monkeypatch)
    found = queue_of_the_long_prompt(tiny_engine, tiny_oracle, tiny_adapters["last"])
    if mutate is without_passing_over:
        assert found["short 0"] > 3
    else:
        assert found["long"] > 4 * PATIENCE
