"""CUDA graphs without CUDA: which steps would replay one, and what a replay computes."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from graphs import Tape, chosen_graphs, compiled_in_pieces
from runners import current_runner
from scenarios import BLOCK, SCENARIOS, ask, check_all, greedy, tokens

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


def choices_of(names, start, oracle, adapters):
    found = []
    scenarios = {**SCENARIOS, "base_rows_alone": base_rows_alone}
    for name in names:
        scenarios[name](
            lambda **settings: chosen_graphs(lambda: start(**settings), found), oracle, adapters
        )
    return found


def base_rows_alone(start, oracle, a):
    """Rows without adapters: prompts together, then decode steps."""
    rows = [(tokens(5 + i, i), None, None) for i in range(4)]
    with start(enable_prefix_caching=False) as llm:
        for _ in range(3):
            check_all(oracle, rows, ask(llm, rows))


NAMES = [
    "base_rows_alone",
    "whole_prompts",
    "cached_turns",
    "hits_up_to_the_last_token",
    "one_token_prompts",
    "speculation",
]


def test_without_pieces_no_step_that_generates_replays_a_graph(
    scheduling, tiny_engine, tiny_oracle, tiny_adapters
):
    """And all others replay the one that vLLM chooses by itself."""

    def start(**settings):
        return tiny_engine(**scheduling, **settings)

    found = choices_of(NAMES, start, tiny_oracle, tiny_adapters)
    # vLLM's choice is a GPU's: graphs of both kinds, for base steps and for those with adapters.
    base, decode, generating = (
        Counter(c.alone for c in found if (c.with_adapters, c.generates) == kind)
        for kind in ((False, False), (True, False), (True, True))
    )
    assert base["FULL"] >= 3, base
    assert base["PIECEWISE"] >= 3, base
    assert decode["FULL"] >= 3, decode
    # Without PEDRO's word, steps that generate would replay graphs too.
    assert generating["PIECEWISE"] >= 3, generating
    assert generating["FULL"] >= 2, generating
    assert {c.chosen for c in found if c.generates} == {"NONE"}
    assert all(c.chosen == c.alone for c in found if not c.generates)


def test_steps_that_generate_replay_piecewise_graphs(tiny_engine, tiny_oracle, tiny_adapters):
    """Base's, where vLLM compiles in pieces: the generators run between them."""

    def start(**settings):
        return tiny_engine(enforce_eager=False, **settings)

    with compiled_in_pieces("eager") as compiled:
        found = choices_of(NAMES[:1] + NAMES[3:5], start, tiny_oracle, tiny_adapters)
    attention = "vllm.unified_kv_cache_update vllm.unified_attention_with_output"
    for pieces in compiled:
        assert pieces == ["", "vllm_pedro.generate_vectors.default", "", attention] * 3 + [""]
    generating = Counter((c.alone, c.chosen) for c in found if c.generates)
    assert set(generating) <= {("FULL", "PIECEWISE"), ("PIECEWISE", "PIECEWISE"), ("NONE", "NONE")}
    assert generating["FULL", "PIECEWISE"] >= 2, generating
    assert generating["PIECEWISE", "PIECEWISE"] >= 2, generating
    assert all(c.chosen == c.alone for c in found if not c.generates)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_pieces_base_rows_are_bit_equal_to_a_plain_engine(dtype, tiny_engine, tiny_adapters):
    """Compiled by Inductor; the split leaves what it computes for base rows as it is."""
    rows = [(tokens(BLOCK + i, i), None, None) for i in range(4)]
    scaled = [(prompt, tiny_adapters["last"], None) for prompt, _, _ in rows]

    def start(**settings):
        return tiny_engine(enforce_eager=False, dtype=dtype, max_num_batched_tokens=512, **settings)

    def values(outputs):
        return [
            (o.outputs[0].token_ids, [list(p.items()) for p in o.prompt_logprobs[1:]])
            for o in outputs
        ]

    params = greedy(prompt_logprobs=3)
    with compiled_in_pieces("inductor") as compiled:
        with start() as llm:
            with_pedro = values(ask(llm, rows, params))
            assert values(ask(llm, scaled, params)) != with_pedro
        with start(pedro=False) as llm:
            assert values(ask(llm, rows, params)) == with_pedro
    assert [len(pieces) for pieces in compiled] == [13, 7]


def test_the_tests_of_choices_would_notice(tiny_engine, tiny_oracle, tiny_adapters, monkeypatch):
    if current_runner() == "v2":
        from vllm_pedro.integration.worker.runner_v2 import PedroGraphsMixin

        monkeypatch.delattr(PedroGraphsMixin, "dispatch")
    else:
        from vllm_pedro.integration.worker.runner_v1 import PedroRunnerV1Mixin

        monkeypatch.delattr(PedroRunnerV1Mixin, "_determine_batch_execution_and_padding")
    names = ["hits_up_to_the_last_token"]
    found = choices_of(names, tiny_engine, tiny_oracle, tiny_adapters)
    assert "FULL" in {c.chosen for c in found if c.generates}


def agreed_graphs(manager, monkeypatch, generates):
    """What ranks of data parallelism settle on, for a decode step of each: (kind, tokens).

    vLLM's own code, but that its ranks are threads here, of which each waits for the others.
    """
    from vllm.v1.worker.gpu import dp_utils

    ranks, tensors = len(generates), []
    barrier = threading.Barrier(ranks, timeout=60)

    def all_reduce(tensor, group):
        tensors.append(tensor.clone())
        barrier.wait()
        tensor.copy_(sum(tensors))
        barrier.wait()

    monkeypatch.setattr(dp_utils.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dp_utils, "get_dp_group", lambda: SimpleNamespace(cpu_group=None))
    monkeypatch.setattr(dp_utils, "should_skip_dp_coordination", lambda: False)

    def dispatch(rank):
        own = copy.copy(manager)
        own.vllm_config = copy.copy(manager.vllm_config)
        own.vllm_config.parallel_config = copy.copy(manager.vllm_config.parallel_config)
        own.vllm_config.parallel_config.data_parallel_size = ranks
        own.pedro = SimpleNamespace(generates_vectors=generates[rank])
        own.pedro_model = SimpleNamespace(is_split=True)
        rows = 2 + rank
        found, _ = dp_utils.dispatch_cg_and_sync_dp(own, rows, rows, 1, ranks, rank, 1)
        return found.cg_mode.name, found.num_tokens

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(dispatch, range(ranks)))


def test_engines_side_by_side_agree_on_no_graph_where_one_generates(
    tiny_engine, tiny_oracle, tiny_adapters, monkeypatch
):
    if current_runner() == "v1":
        pytest.skip("V1's ranks say what they want after PEDRO has had its word")
    from vllm_pedro.integration.worker.runner_v2 import PedroGraphsMixin

    with chosen_graphs(tiny_engine, []) as llm:
        manager = runner_of(llm).cudagraph_manager
    assert agreed_graphs(manager, monkeypatch, [False, False]) == [("FULL", 4), ("FULL", 4)]
    for generates in ([True, False], [False, True], [True, True]):
        found = agreed_graphs(manager, monkeypatch, generates)
        assert found == [("NONE", 2), ("NONE", 3)]
    # Were it to ask for pieces, as an engine by itself does, the ranks would part.
    monkeypatch.setattr(PedroGraphsMixin, "dp_size", 1, raising=False)
    kinds = [kind for kind, _ in agreed_graphs(manager, monkeypatch, [True, False])]
    assert kinds == ["PIECEWISE", "FULL"]


def runner_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def rows_of(adapters):
    names = ["last", None, "mean", "other", "max"]
    return [(tokens(BLOCK + i, i), adapters.get(name), None) for i, name in enumerate(names)]


def test_a_replay_gives_what_the_eager_step_gives(tiny_engine, tiny_oracle, tiny_adapters):
    """A decode step is recorded as a capture does it, on the identity, and run again with adapters.

    What a graph takes from Python is fixed at its capture, so the operators have to read everything
    that changes from the buffers that a step's plan fills.
    """
    rows = rows_of(tiny_adapters)
    with tiny_engine(enable_prefix_caching=False) as llm:
        runner = runner_of(llm)
        if current_runner() == "v1":
            from runners import stage_as_on_a_device

            stage_as_on_a_device(llm)  # else a dummy run launches no operator
        pedro, forward = runner.pedro, runner.model.forward
        replays = 0

        def state():
            return [cache.clone() for cache in runner.kv_caches]

        def restore(saved):
            for cache, old in zip(runner.kv_caches, saved, strict=True):
                cache.copy_(old)

        def step(*args, **kwargs):
            nonlocal replays
            plan = pedro.plan
            if not plan.num_with_adapter or pedro.generates_vectors:
                return forward(*args, **kwargs)
            before = state()
            runner.pedro_model.clear_step()
            with Tape() as tape:
                output = forward(*args, **kwargs)
            identity = output.clone()
            assert not any("generate_vectors" in name for name in tape.names())
            assert sum("scale_columns_" in name for name in tape.names()) == 2 * 3  # in each layer
            restore(before)
            pedro.store.load_plan(plan)
            tape.replay()
            replayed, cache = output.clone(), state()
            restore(before)
            pedro.plan = plan
            runner.pedro_model.switch()
            eager = forward(*args, **kwargs)
            assert torch.equal(replayed, eager)
            assert all(map(torch.equal, cache, runner.kv_caches))
            assert not torch.equal(replayed, identity)
            replays += 1
            return eager

        runner.model.forward = step
        check_all(tiny_oracle, rows, ask(llm, rows))
        assert replays >= 5


def test_dummy_and_capture_runs_leave_no_trace(scheduling, tiny_engine, tiny_oracle, tiny_adapters):
    """In the middle of running requests, as a data-parallel rank without work runs them."""
    rows = rows_of(tiny_adapters)
    with tiny_engine(**scheduling, max_num_batched_tokens=256) as llm:
        runner = runner_of(llm)
        execute = runner.execute_model
        dummies = 0

        def step(scheduler_output, *args, **kwargs):
            nonlocal dummies
            if not kwargs.get("dummy_run") and scheduler_output.total_num_scheduled_tokens:
                before = [v.clone() for v in runner.pedro.store.vectors]
                runner._dummy_run(4)
                if current_runner() == "v2":
                    # V2 holds the outcome of a run until it is sampled.
                    runner.execute_model_state = None
                    runner.model_state.prepare_dummy_inputs(2, 2)  # before a capture
                assert not runner.pedro.generates_vectors
                assert not runner.pedro.store.token_rows.any()
                assert all(map(torch.equal, before, runner.pedro.store.vectors))
                dummies += 1
            return execute(scheduler_output, *args, **kwargs)

        runner.execute_model = step
        check_all(tiny_oracle, rows, ask(llm, rows))
        rows = [([7], adapter, None) for _, adapter, _ in rows]
        check_all(tiny_oracle, rows, ask(llm, rows, greedy(3, prompt_logprobs=None)))
        assert dummies > 5


def without_clearing(patch):
    from vllm_pedro.serving.runtime import PedroRuntime

    patch.setattr(PedroRuntime, "clear_step", lambda self: None)


def test_a_dummy_run_that_leaves_a_trace_is_noticed(
    tiny_engine, tiny_oracle, tiny_adapters, monkeypatch
):
    without_clearing(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        test_dummy_and_capture_runs_leave_no_trace({}, tiny_engine, tiny_oracle, tiny_adapters)


def test_steps_that_warm_the_runner_up_come_from_no_scheduler(
    tiny_engine, tiny_oracle, tiny_adapters
):
    """A GPU's worker makes a V2 runner's first steps itself, to have kernels compiled."""
    if current_runner() == "v1":
        pytest.skip("V1 is warmed up by dummy runs")
    from vllm.v1.worker.gpu import warmup

    rows, steps = rows_of(tiny_adapters), []
    with tiny_engine(enable_prefix_caching=False) as llm:
        runner = runner_of(llm)

        def execute(scheduler_output):
            steps.append(scheduler_output.total_num_scheduled_tokens)
            return runner.execute_model(scheduler_output)

        # `warmup_kernels` makes its steps alike, but samples in ways that no interpreter can.
        assert warmup.run_mixed_prefill_decode_warmup(runner, execute, runner.sample_tokens, 16)
        assert sum(count > 0 for count in steps) == 2, steps
        check_all(tiny_oracle, rows, ask(llm, rows))
