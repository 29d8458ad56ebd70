"""Rules 1 to 4: whole prompts, cache keys, preemption, beams; and that each protection is
needed.
"""

from __future__ import annotations

import pytest
from engines import Mismatch

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]

BLOCK = 32  # the smallest that vLLM's CPU attention takes


def tokens(length, seed=0):
    return [(seed * 31 + 7 * i * i + 3 * i) % 128 for i in range(length)]


def greedy(max_tokens=8, **kwargs):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0, max_tokens=max_tokens, detokenize=False, ignore_eos=True, **kwargs
    )


def ask(llm, rows, params=None):
    """Run rows of (prompt, adapter or None, prompt_length or None) as one batch."""
    from vllm_pedro import PedroRequest

    requests = [
        None if path is None else PedroRequest(path.name, i + 1, str(path), prompt_length=length)
        for i, (_, path, length) in enumerate(rows)
    ]
    return llm.generate(
        [{"prompt_token_ids": p} for p, _, _ in rows],
        params or greedy(),
        lora_request=requests,
        use_tqdm=False,
    )


def check_all(oracle, rows, outputs):
    for (_, adapter, length), output in zip(rows, outputs, strict=True):
        oracle.check(output, adapter, length)


@pytest.fixture(scope="module")
def adapters(tiny, write_adapter):
    def write(seed, **config):
        return write_adapter(tiny, seed=seed, scale=0.2, down_scale=15.0, **config)

    return {
        "last": write(1),
        "other": write(2, r=8, target_modules=["v_proj", "k_proj", "gate_proj"]),
        "mean": write(3, pooling="mean", activation="gelu"),
        "max": write(4, pooling="max", activation="relu"),
        "static": write(5, r=0),
    }


# Each scenario starts its engine, asks, and checks every answer against the reference.


def whole_prompts(start, oracle, a):
    """Prompts nearly as long as a step's budget, beside base prompts that are longer than it."""
    names = ["last", "mean", "max", "other", None]
    rows = [(tokens(60 - 5 * i, i), a.get(names[i % 5]), None) for i in range(10)]
    rows += [(tokens(150, 50), None, None), (tokens(60, 51), a["last"], None)]
    with start(max_num_batched_tokens=64, max_num_seqs=8, enable_prefix_caching=False) as llm:
        check_all(oracle, rows, ask(llm, rows))


def cached_prompts(start, oracle, a):
    """Same text under other adapters, again, as base, and with other endings; with prefix cache."""
    with start(enable_prefix_caching=True) as llm:
        for length in (BLOCK * 3, BLOCK * 3 + 1, BLOCK * 3 - 1, BLOCK, BLOCK + 1, 1):
            prompt = tokens(length, 7)
            for name in ("last", "other", "mean", "static", None, "last", "max", None, "mean"):
                rows = [(prompt, a.get(name), None)]
                check_all(oracle, rows, ask(llm, rows, greedy(4, prompt_logprobs=None)))
        shared = tokens(BLOCK * 4, 9)
        for ending in range(3):
            rows = [
                (shared + tokens(5 + ending, 20 + ending), a[name], None)
                for name in ("last", "other", "mean")
            ]
            check_all(oracle, rows, ask(llm, rows))


def cached_turns(start, oracle, a):
    """Later turns go on with the first turn's vectors; their cached KV reaches past P."""
    with start(enable_prefix_caching=True) as llm:
        for name in ("last", "mean", "other"):
            sequence, length = tokens(BLOCK + 5, 11), BLOCK + 5
            for turn in range(3):
                rows = [(sequence, a[name], length)]
                outputs = ask(llm, rows, greedy(BLOCK + 3))
                check_all(oracle, rows, outputs)
                sequence = sequence + list(outputs[0].outputs[0].token_ids) + tokens(9, turn)


def forgotten_turns(start, oracle, a):
    """Later turns whose KV is cached past P but whose vectors went to another prompt."""
    first, length = tokens(BLOCK + 5, 11), BLOCK + 5
    with start(enable_prefix_caching=True, max_num_seqs=1) as llm:
        for name in ("last", "mean"):
            rows = [(first, a[name], None)]
            outputs = ask(llm, rows, greedy(BLOCK * 2))
            check_all(oracle, rows, outputs)
            other = [(tokens(9, 40), a["max"], None)]  # takes the only row of the vector store
            check_all(oracle, other, ask(llm, other))
            rows = [(first + list(outputs[0].outputs[0].token_ids), a[name], length)]
            check_all(oracle, rows, ask(llm, rows))


def prompt_ends(start, oracle, a):
    """Explicit prompt ends, with tokens past P that are chunked."""
    rows = [
        (tokens(180, 1), a["last"], 40),
        (tokens(180, 1), a["mean"], 64),
        (tokens(30, 2), a["other"], 1),
        (tokens(90, 3), a["max"], 33),
    ]
    with start(max_num_batched_tokens=64, max_num_seqs=4) as llm:
        for _ in range(2):
            check_all(oracle, rows, ask(llm, rows))


def preemption(start, oracle, a):
    """A KV cache of a few blocks and long answers: sequences are evicted and recomputed."""
    names = ["last", None, "mean", "other", "max", "static"]
    rows = [(tokens(20 + 3 * i, i), a.get(names[i]), None) for i in range(6)]
    for caching in (False, True):
        with start(
            num_gpu_blocks_override=11, max_num_seqs=6, enable_prefix_caching=caching,
            disable_log_stats=False, max_num_batched_tokens=256,
        ) as llm:  # fmt: skip
            outputs = ask(llm, rows, greedy(60))
            preempted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
        assert sum(preempted) > 0, "nothing was preempted, so this proves nothing"
        check_all(oracle, rows, outputs)


def device_slots(start, oracle, a):
    """More tenants in a batch than fit the device or the host cache."""
    rows = [(tokens(10 + i, i), list(a.values())[i % 5], None) for i in range(8)]
    with start(max_pedros=1, max_cpu_pedros=2) as llm:
        check_all(oracle, rows, ask(llm, rows))


def parallel_samples(start, oracle, a):
    """n > 1 with prefix cache: siblings share the prompt's blocks."""
    from vllm import SamplingParams

    rows = [(tokens(BLOCK * 2, 5), a["last"], None), (tokens(21, 6), a["mean"], None)]
    params = SamplingParams(
        n=3, temperature=1.0, seed=1, max_tokens=6, logprobs=0, detokenize=False, ignore_eos=True
    )
    with start(enable_prefix_caching=True) as llm:
        for (_, adapter, _), output in zip(rows, ask(llm, rows, params), strict=True):
            assert len({tuple(c.token_ids) for c in output.outputs}) > 1
            for completion in range(3):
                oracle.check_sampled(output, adapter, completion)


def speculation(start, oracle, a):
    """n-gram speculation: drafts are verified under the sequence's own vectors."""
    loop = tokens(6, 3) * 6
    rows = [(loop, a["last"], None), (loop, None, None), (loop, a["mean"], None)]
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with start(speculative_config=config, enable_prefix_caching=True) as llm:
        for _ in range(2):
            check_all(oracle, rows, ask(llm, rows, greedy(20)))


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        whole_prompts,
        cached_prompts,
        cached_turns,
        forgotten_turns,
        prompt_ends,
        preemption,
        device_slots,
        parallel_samples,
        speculation,
    )
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, tiny_engine, tiny_oracle, adapters):
    SCENARIOS[name](tiny_engine, tiny_oracle, adapters)


# Mutations: take one protection out, and the named scenario has to fail.


def without_whole_prompts(patch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_pedro.integration.scheduler import PedroSchedulerMixin

    patch.setattr(
        PedroSchedulerMixin, "_reserve_prefill_lookahead", Scheduler._reserve_prefill_lookahead
    )


def without_hit_limit(patch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_pedro.integration.scheduler import PedroSchedulerMixin

    patch.setattr(
        PedroSchedulerMixin, "_get_local_prefix_cache_hit", Scheduler._get_local_prefix_cache_hit
    )


SALT = "vllm_pedro.integration.processor.cache_salt"


def without_salt(patch):
    patch.setattr(SALT, lambda salt, spec: salt)


def without_prompt_in_salt(patch):
    patch.setattr(SALT, lambda salt, spec: spec.digest)


def without_adapter_in_salt(patch):
    patch.setattr(SALT, lambda salt, spec: spec.prompt_digest)


def without_cache_bypass_for_mean_pooling(patch):
    from vllm_pedro.serving.spec import RequestSpec

    # A class attribute would be a slot's descriptor: shadow the value as it comes off the wire.
    from_wire = RequestSpec.from_wire.__func__
    patch.setattr(
        RequestSpec,
        "from_wire",
        classmethod(lambda cls, value: from_wire(cls, {**value, "needs_all_states": False})),
    )


def with_vectors_shared_by_adapter_alone(patch):
    from vllm_pedro.serving.spec import RequestSpec

    patch.setattr(RequestSpec, "vector_key", property(lambda self: (self.digest, "")))


def with_vectors_shared_by_prompt_alone(patch):
    from vllm_pedro.serving.spec import RequestSpec

    patch.setattr(RequestSpec, "vector_key", property(lambda self: ("", self.prompt_digest)))


def with_rows_never_returned(patch):
    from vllm_pedro.serving.slots import VectorSlots

    patch.setattr(VectorSlots, "release", lambda self, request_id: None)


def with_a_shorter_prompt(patch):
    from vllm_pedro.serving.spec import RequestSpec

    from_wire = RequestSpec.from_wire.__func__

    def shorter(cls, value):
        return from_wire(cls, {**value, "prompt_length": max(1, value["prompt_length"] - 1)})

    patch.setattr(RequestSpec, "from_wire", classmethod(shorter))


def without_adapter_limit_per_step(patch):
    from vllm_pedro.integration.scheduler import PedroSchedulerMixin

    schedule = PedroSchedulerMixin.schedule

    def unlimited(self, *args, **kwargs):
        self._pedro_max_adapters = 1000
        return schedule(self, *args, **kwargs)

    patch.setattr(PedroSchedulerMixin, "schedule", unlimited)


MUTATIONS = [
    (without_whole_prompts, "whole_prompts"),
    (without_hit_limit, "forgotten_turns"),
    (without_salt, "cached_prompts"),
    (without_prompt_in_salt, "cached_prompts"),
    (without_adapter_in_salt, "cached_prompts"),
    (without_cache_bypass_for_mean_pooling, "forgotten_turns"),
    (with_rows_never_returned, "whole_prompts"),
    (with_vectors_shared_by_adapter_alone, "cached_prompts"),
    (with_vectors_shared_by_prompt_alone, "cached_prompts"),
    (with_a_shorter_prompt, "prompt_ends"),
    (without_adapter_limit_per_step, "device_slots"),
]


@pytest.mark.parametrize(("mutate", "scenario"), MUTATIONS, ids=lambda v: getattr(v, "__name__", v))
def test_protection_is_needed(mutate, scenario, tiny_engine, tiny_oracle, adapters, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises((Mismatch, RuntimeError)):
        SCENARIOS[scenario](tiny_engine, tiny_oracle, adapters)
