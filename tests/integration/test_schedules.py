"""Rules 1 to 4: whole prompts, cache keys, preemption, beams; and that each protection is
needed.
"""

from __future__ import annotations

from collections import Counter

import pytest
from engines import Mismatch
from runners import current_runner, triton_operators
from scenarios import SCENARIOS

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name, scheduling, tiny_engine, tiny_oracle, tiny_adapters):
    def start(**settings):
        return tiny_engine(**scheduling, **settings)

    SCENARIOS[name](start, tiny_oracle, tiny_adapters)


@pytest.mark.skipif(current_runner() == "v1", reason="Triton's interpreter runs on V2 alone")
@pytest.mark.parametrize("name", ["whole_prompts", "one_token_prompts", "device_slots"])
def test_scenario_with_the_triton_operators(name, tiny_engine, tiny_oracle, tiny_adapters):
    from vllm_pedro.ops import triton_kernels

    called = Counter()

    def counted(name):
        original = getattr(triton_kernels, name)

        def call(*args):
            called[name] += 1
            return original(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for operator in ("generate_vectors", "scale_columns_"):
            patch.setattr(triton_kernels, operator, counted(operator))
        with triton_operators():
            SCENARIOS[name](tiny_engine, tiny_oracle, tiny_adapters)
    assert called["generate_vectors"] > 9
    assert called["scale_columns_"] > 50


# Mutations: take one protection out, and the named scenario has to fail.


def without_whole_prompts(patch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_pedro.integration.scheduler import PedroSchedulerMixin

    for name in ("_reserve_prefill_lookahead", "_ec_transfer_pending"):
        patch.setattr(PedroSchedulerMixin, name, getattr(Scheduler, name))


def without_hit_limit(patch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_pedro.integration.scheduler import PedroSchedulerMixin

    patch.setattr(
        PedroSchedulerMixin, "_get_local_prefix_cache_hit", Scheduler._get_local_prefix_cache_hit
    )


KEY = "vllm_pedro.integration.block_keys.cache_key"


def without_key(patch):
    patch.setattr(KEY, lambda spec: "")


def without_prompt_in_key(patch):
    patch.setattr(KEY, lambda spec: spec.digest)


def without_adapter_in_key(patch):
    patch.setattr(KEY, lambda spec: spec.prompt_digest)


def without_cache_bypass_for_mean_pooling(patch):
    from vllm_pedro.serving.spec import RequestSpec

    # A class attribute would be a slot's descriptor: shadow the value as it comes off the wire.
    from_wire = RequestSpec.from_wire.__func__
    patch.setattr(
        RequestSpec,
        "from_wire",
        classmethod(lambda cls, value: from_wire(cls, {**value, "pools": "last"})),
    )


def with_vectors_shared_by_adapter_alone(patch):
    from vllm_pedro.serving.spec import RequestSpec

    patch.setattr(RequestSpec, "vector_key", property(lambda self: (self.digest, "")))


def with_vectors_shared_by_prompt_alone(patch):
    from vllm_pedro.serving.spec import RequestSpec

    patch.setattr(RequestSpec, "vector_key", property(lambda self: ("", self.prompt_digest)))


def with_rows_never_returned(patch):
    from vllm_pedro.serving.rows import VectorRows

    patch.setattr(VectorRows, "free", lambda self, request_id: None)


def with_a_shorter_prompt(patch):
    from vllm_pedro.serving.spec import RequestSpec

    from_wire = RequestSpec.from_wire.__func__

    def shorter(cls, value):
        return from_wire(cls, {**value, "prompt_length": max(1, value["prompt_length"] - 1)})

    patch.setattr(RequestSpec, "from_wire", classmethod(shorter))


def without_adapter_limit_per_step(patch):
    from vllm_pedro.integration.scheduler import PedroSchedulerMixin
    from vllm_pedro.serving.loading import Prefetches

    patch.setattr(PedroSchedulerMixin, "_pedro_has_room_for", lambda self, spec: True)
    # Adapters are asked for one after another here, and so come into different steps.
    patch.setattr(Prefetches, "is_due", lambda *_: True)


def without_adapters_of_preempted_requests(patch):
    """As if a preempted request had ended: its adapter may be freed."""
    if current_runner() == "v2":
        from vllm_pedro.integration.worker.runner_v2 import PedroModelStateMixin

        def remove_request(self, req_id):
            self.pedro.finish((req_id,))
            super(PedroModelStateMixin, self).remove_request(req_id)

        patch.setattr(PedroModelStateMixin, "remove_request", remove_request)
    else:
        from vllm_pedro.serving.runtime import PedroRuntime

        drop = PedroRuntime._drop

        def drop_all(self, digests):
            specs, self._specs = self._specs, {}
            drop(self, digests)
            self._specs = specs

        patch.setattr(PedroRuntime, "_drop", drop_all)


MUTATIONS = [
    (without_whole_prompts, "whole_prompts"),
    (without_hit_limit, "forgotten_turns"),
    (without_key, "cached_prompts"),
    (without_prompt_in_key, "cached_prompts"),
    (without_adapter_in_key, "cached_prompts"),
    (without_cache_bypass_for_mean_pooling, "forgotten_turns"),
    (with_rows_never_returned, "whole_prompts"),
    (with_vectors_shared_by_adapter_alone, "cached_prompts"),
    (with_vectors_shared_by_prompt_alone, "cached_prompts"),
    (with_a_shorter_prompt, "prompt_ends"),
    (without_adapter_limit_per_step, "device_slots"),
    (without_adapters_of_preempted_requests, "unloaded_while_preempted"),
]


@pytest.mark.parametrize(("mutate", "scenario"), MUTATIONS, ids=lambda v: getattr(v, "__name__", v))
def test_protection_is_needed(
    mutate, scenario, tiny_engine, tiny_oracle, tiny_adapters, monkeypatch
):
    mutate(monkeypatch)
    with pytest.raises((Mismatch, RuntimeError)):
        SCENARIOS[scenario](tiny_engine, tiny_oracle, tiny_adapters)
