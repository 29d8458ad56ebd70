"""Schedules that tests run on both runners: each starts its engine, asks, checks every answer."""

from __future__ import annotations

BLOCK = 32  # the smallest that vLLM's CPU attention takes


class Queue:
    """An engine driven step by step; requests come in at the steps that a test says."""

    def __init__(self, llm, oracle):
        self.engine, self.oracle = llm.llm_engine, oracle
        self.step_number, self.first, self.outputs, self.adapters = 0, {}, {}, {}
        self.order = iter(range(1 << 20))

    def add(self, name, prompt, adapter=None, max_tokens=4, priority=0):
        from vllm_pedro import PedroRequest

        request = adapter and PedroRequest(adapter.name, 1, str(adapter))
        self.engine.add_request(
            name, {"prompt_token_ids": prompt}, greedy(max_tokens), lora_request=request,
            arrival_time=float(next(self.order)), priority=priority,
        )  # fmt: skip
        self.adapters[name] = adapter

    def load(self, *adapters):
        """Have them in memory, so that nothing waits for the disk."""
        for i, adapter in enumerate(adapters):
            self.add(f"load {i}", tokens(7, 90 + i), adapter, max_tokens=1)
            self.finish()

    def step(self, count=1):
        for _ in range(count):
            self.step_number += 1
            for output in self.engine.step():
                self.outputs[output.request_id] = output
                self.first.setdefault(output.request_id, self.step_number)

    def finish(self):
        """Run to the end; every answer is the reference's."""
        while self.engine.has_unfinished_requests():
            self.step()
            assert self.step_number < 2000
        for name, adapter in self.adapters.items():
            self.oracle.check(self.outputs[name], adapter)
        return self.first


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


def whole_prompts(start, oracle, a):
    """Prompts nearly as long as a step's budget, beside base prompts that are longer than it."""
    names = ["last", "mean", "max", "other", None]
    rows = [(tokens(60 - 5 * i, i), a.get(names[i % 5]), None) for i in range(10)]
    rows += [(tokens(150, 50), None, None), (tokens(60, 51), a["last"], None)]
    with start(max_num_batched_tokens=64, max_num_seqs=8, enable_prefix_caching=False) as llm:
        check_all(oracle, rows, ask(llm, rows, greedy(5)))


def cached_prompts(start, oracle, a):
    """Same text under other adapters, again, as base, and with other endings; with prefix cache."""
    with start(enable_prefix_caching=True) as llm:
        for length in (BLOCK * 3, BLOCK * 3 + 1, BLOCK * 3 - 1, BLOCK, BLOCK + 1, 1):
            prompt = tokens(length, 7)
            for name in ("last", "other", "mean", "static", None, "last", "max", None, "mean"):
                rows = [(prompt, a.get(name), None)]
                check_all(oracle, rows, ask(llm, rows, greedy(3, prompt_logprobs=None)))
        shared = tokens(BLOCK * 4, 9)
        for ending in range(3):
            rows = [
                (shared + tokens(5 + ending, 20 + ending), a[name], None)
                for name in ("last", "other", "mean")
            ]
            check_all(oracle, rows, ask(llm, rows, greedy(4)))


def cached_turns(start, oracle, a):
    """Later turns go on with the first turn's vectors; their cached KV reaches past P."""
    length = BLOCK + 5
    rows = [(tokens(length, 11), a[name], length) for name in ("last", "mean", "other")]
    with start(enable_prefix_caching=True) as llm:
        for turn in range(3):
            # So many that a later turn finds a block that ends past P.
            outputs = ask(llm, rows, greedy(BLOCK - 4))
            check_all(oracle, rows, outputs)
            assert turn == 0 or all(o.num_cached_tokens > length for o in outputs)
            rows = [
                (prompt + list(o.outputs[0].token_ids) + tokens(9, turn), adapter, length)
                for (prompt, adapter, _), o in zip(rows, outputs, strict=True)
            ]


def forgotten_turns(start, oracle, a):
    """Later turns whose KV is cached past P but whose vectors went to another prompt."""
    first, length = tokens(BLOCK + 5, 11), BLOCK + 5
    with start(enable_prefix_caching=True, max_num_seqs=1) as llm:
        for name in ("last", "mean"):
            rows = [(first, a[name], None)]
            outputs = ask(llm, rows, greedy(BLOCK - 4))  # the last block ends past P
            check_all(oracle, rows, outputs)
            other = [(tokens(9, 40), a["max"], None)]  # takes the only row of the vector store
            check_all(oracle, other, ask(llm, other))
            rows = [(first + list(outputs[0].outputs[0].token_ids), a[name], length)]
            check_all(oracle, rows, ask(llm, rows))


def hits_up_to_the_last_token(start, oracle, a):
    """All blocks but one token are cached, and the vectors went to another prompt."""
    prompt = tokens(BLOCK + 1, 12)
    with start(enable_prefix_caching=True, max_num_seqs=1) as llm:
        for name in ("last", "other", "last", "other"):
            for row in ((prompt, a[name], None), (tokens(9, 40), a["max"], None)):
                check_all(oracle, [row], ask(llm, [row], greedy(3, prompt_logprobs=None)))


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
            check_all(oracle, rows, ask(llm, rows, greedy(5)))


def preemption(start, oracle, a):
    """A KV cache of a few blocks and long answers: sequences are evicted and recomputed."""
    names = ["last", None, "mean", "other", "max", "static"]
    rows = [(tokens(20 + 3 * i, i), a.get(names[i]), None) for i in range(6)]
    for caching in (False, True):
        with start(
            num_gpu_blocks_override=8, max_model_len=128, max_num_seqs=6, disable_log_stats=False,
            enable_prefix_caching=caching, max_num_batched_tokens=256,
        ) as llm:  # fmt: skip
            outputs = ask(llm, rows, greedy(16))
            preempted = [m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"]
        assert sum(preempted) > 0, "nothing was preempted, so this proves nothing"
        check_all(oracle, rows, outputs)


def device_slots(start, oracle, a):
    """More tenants in a batch than fit the device at once; then than are prefilled in a step."""
    rows = [(tokens(10 + i, i), list(a.values())[i % 5], None) for i in range(8)]
    memory = max(oracle.adapter_bytes(adapter) for _, adapter, _ in rows)
    for limits in ({"max_pedros": None, "pedro_memory_bytes": memory}, {"max_pedros": 1}):
        with start(max_cpu_pedros=2, **limits) as llm:
            check_all(oracle, rows, ask(llm, rows, greedy(4)))


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


def one_token_prompts(start, oracle, a):
    """Prompts that look like decode steps, alone and among running rows."""
    with start(enable_prefix_caching=True) as llm:
        for name in ("last", "mean", None):
            rows = [([token], a.get(name), None) for token in (3, 4, 3)]
            check_all(oracle, rows, ask(llm, rows, greedy(3, prompt_logprobs=None)))
        rows = [
            (tokens(BLOCK, 8), a["last"], None),
            *[([9], a["max"], None)] * 2,
            ([9], None, None),
        ]
        check_all(oracle, rows, ask(llm, rows, greedy(3, prompt_logprobs=None)))


def aborts_and_resets(start, oracle, a):
    """Requests that are aborted and a cache that is emptied under way, then the same prompts."""
    from vllm_pedro import PedroRequest

    rows = [(tokens(40 + i, i), a[name], None) for i, name in enumerate(("last", "mean", "other"))]
    with start(enable_prefix_caching=True) as llm:
        engine = llm.llm_engine
        for steps in (0, 1, 3):
            ids = [
                engine.add_request(
                    f"{steps}-{i}", {"prompt_token_ids": prompt}, greedy(8),
                    lora_request=PedroRequest("a", 1, str(path)),
                )
                for i, (prompt, path, _) in enumerate(rows)
            ]  # fmt: skip
            for _ in range(steps):
                engine.step()
            if steps:
                assert engine.reset_prefix_cache(reset_running_requests=True)
            engine.abort_request(ids[:2], internal=True)
            finished = []
            while engine.has_unfinished_requests():
                finished += [o for o in engine.step() if o.finished]
            (last,) = finished
            oracle.check(last, rows[2][1])
            check_all(oracle, rows, ask(llm, rows))


def unloaded_while_preempted(start, oracle, a):
    """Adapters that are unloaded, their folders gone, while requests with them are preempted."""
    from vllm_pedro import PedroRequest

    names = ["last", "mean", "other", "max"]
    rows = [(tokens(20 + 3 * i, i), a[name], None) for i, name in enumerate(names)]
    with start(max_pedros=4) as llm:
        engine = llm.llm_engine
        core = engine.engine_core.engine_core
        runtime = core.model_executor.driver_worker.worker.model_runner.pedro
        for i, (prompt, path, _) in enumerate(rows):
            engine.add_request(
                str(i), {"prompt_token_ids": prompt}, greedy(12),
                lora_request=PedroRequest(names[i], 1, str(path)),
            )  # fmt: skip
        outputs, away = {}, []
        try:
            for step in range(200):
                if step == 5:
                    # All are preempted, and their vectors forgotten.
                    assert engine.reset_prefix_cache(reset_running_requests=True)
                    for digest in {spec.digest for spec in runtime._specs.values()}:
                        engine.collective_rpc("pedro_retire", args=(digest,))
                    for _, path, _ in rows:
                        away.append((path.rename(path.with_name(path.name + "-away")), path))
                for output in engine.step():
                    outputs[int(output.request_id)] = output
                if step > 5 and not engine.has_unfinished_requests():
                    break
        finally:
            for moved, path in away:
                moved.rename(path)
        check_all(oracle, rows, [outputs[i] for i in range(len(rows))])
        for _ in range(3):  # tell the worker which requests ended
            engine.step()
        assert len(runtime.bank) == 0, "adapters that were unloaded are still in memory"


def speculation(start, oracle, a):
    """n-gram speculation: drafts are verified under the sequence's own vectors."""
    loop = tokens(6, 3) * 6
    rows = [(loop, a["last"], None), (loop, None, None), (loop, a["mean"], None)]
    config = {"num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with start(
        speculative_config=config, enable_prefix_caching=True, disable_log_stats=False
    ) as llm:
        for _ in range(2):
            check_all(oracle, rows, ask(llm, rows, greedy(12)))
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0  # the fuzzer sees to accepted ones


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        whole_prompts,
        cached_prompts,
        cached_turns,
        forgotten_turns,
        hits_up_to_the_last_token,
        prompt_ends,
        preemption,
        device_slots,
        parallel_samples,
        one_token_prompts,
        aborts_and_resets,
        unloaded_while_preempted,
        speculation,
    )
}
