"""The benchmark's part that touches vLLM: engines, and what its client makes of our files."""

from __future__ import annotations

import gc

import pytest

from vllm_pedro.bench.adapters import write_adapters
from vllm_pedro.bench.cases import engine_options
from vllm_pedro.bench.engines import EngineProcess, run
from vllm_pedro.bench.serving import client_arguments, client_data
from vllm_pedro.bench.workloads import (
    Request,
    Workload,
    arrive_by_rate,
    assign_tenants,
    closed_loop,
    fixed_lengths,
)
from vllm_pedro.errors import PedroError

pytestmark = pytest.mark.engine

SETTINGS = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "kv_cache_memory_bytes": 1 << 24,
    "skip_tokenizer_init": True,
    "block_size": 32,
}


def keywords(kind, model):
    common = {"model": str(model), "distributed_executor_backend": "uni", **SETTINGS}
    return common | engine_options(f"{kind}-eager", tenants=3)


@pytest.mark.parametrize("kind", ["base", "pedro", "lora"])
def test_engines_of_each_kind_run_workloads(kind, tiny, tmp_path):
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from vllm_pedro.integration.stepped import SteppedLLM

    mixed = Workload("mixed", (Request(20, 5), Request(1, 1), Request(33, 7), Request(9, 2)), "")
    tenants = [None] * 4
    engine = SteppedLLM(keywords(kind, tiny))
    try:
        tasks = []
        for adapters in {"base": (), "pedro": ("pedro", "static"), "lora": ("lora",)}[kind]:
            paths = write_adapters(str(tiny), tmp_path / adapters, adapters, 3)
            tenants = assign_tenants("uniform", 4, 3)
            tasks.append((mixed.with_tenants(tenants), list(map(str, paths))))
        tasks = tasks or [(mixed, [])]
        tasks.append((closed_loop(mixed, 2), tasks[0][1]))
        tasks.append((arrive_by_rate(mixed, 50), tasks[0][1]))
        for task in tasks:
            timings = run(engine, kind, *task)
            assert [len(t.tokens) for t in timings] == [5, 1, 7, 2]
            assert all(t.ttft > 0 and t.tokens == sorted(t.tokens) for t in timings)
        facts = engine.facts
        assert facts["kv_blocks"] > 0
        # Keys and values of 3 layers, 1 head of 32, float32, 32 tokens.
        assert facts["kv_block_bytes"] == 2 * 3 * 1 * 32 * 4 * 32
        assert not facts["compiled"]
        assert engine.peak_bytes()["host"] > 2**27
        if kind == "pedro":
            # q, k (it lies between), v and up: 64 + 32 + 32 + 128 columns of 3 layers, float32.
            assert facts["sequence_bytes"] == 3 * 256 * 4
            assert facts["store_bytes"] == 5 * facts["sequence_bytes"]
            assert facts["slot_bytes"] > 3 * 12 * (64 + 224) * 4
        assert ("slot_bytes" in facts) == (kind != "base")
    finally:
        engine.shutdown()
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()


@pytest.mark.parametrize("kind", ["base", "plain"])  # a plain one fails if the plugin is loaded
def test_an_engine_in_a_process_of_its_own(kind, tiny, tmp_path):
    engine = EngineProcess(f"{kind}-eager", keywords(kind, tiny), tmp_path / "log")
    process = engine._process
    try:
        engine.wait()
        timings = engine.run(fixed_lengths(2, 8, 3))
        assert [len(t.tokens) for t in timings] == [3, 3]
        profile = engine.profile(fixed_lengths(2, 8, 9), (), steps=3)
        assert any(name.startswith("aten::") and us > 0 for name, (us, _) in profile.items())
        assert profile[""][1] == 3
        assert engine.facts["start_s"] > engine.facts["engine_s"] > 0
        assert engine.peak_bytes()["host"] > 2**27
        # What fails tells why; the engine does not go on after it.
        with pytest.raises(PedroError, match=r", eager\) failed: .*maximum"):
            engine.run(fixed_lengths(1, 100, 3))
    finally:
        engine.close()
    assert process.exitcode == 0


class Tokenizer:
    all_special_ids = (0,)

    def get_vocab(self):
        return {str(i): i for i in range(500)}


def client_samples(workload, folder, names=None):
    """What vLLM's client reads from the file and the arguments that we give it."""
    from vllm.benchmarks.datasets import get_samples
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (folder / "data.jsonl").write_text(client_data(workload))
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    args = parser.parse_args(client_arguments(workload, "/model", "http://h:1", names, folder))
    return args, get_samples(args, Tokenizer())


def test_the_client_sends_what_the_workload_says(tmp_path):
    requests = (
        Request(1100, 5, 0, 0.0),
        Request(1050, 6, 1, 1.5),
        Request(30, 1, None, 2.0),
    )
    names = ["one", "two", "backbone"]
    args, samples = client_samples(Workload("w", requests, ""), tmp_path, names)
    assert [s.prompt_len for s in samples] == [1100, 1050, 30]
    assert [len(s.prompt) for s in samples] == [1100, 1050, 30]
    assert [s.expected_output_len for s in samples] == [5, 6, 1]
    assert [s.timestamp for s in samples] == [0.0, 1.5, 2.0]
    assert samples[0].prompt[:16] != samples[1].prompt[:16]
    assert args.lora_modules == names
    assert args.lora_assignment == "round-robin"
    assert args.self_timed is True
    assert args.ignore_eos


def test_the_client_keeps_prompts_apart(tmp_path):
    workload = closed_loop(fixed_lengths(6, 40, 3), 2)
    args, samples = client_samples(workload, tmp_path)
    assert args.self_timed is False
    assert args.max_concurrency == 2
    assert args.request_rate == float("inf")
    assert [len(s.prompt) for s in samples] == [40] * 6
    assert len({tuple(s.prompt[:8]) for s in samples}) == 6
