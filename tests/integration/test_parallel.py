"""Engines of several ranks, on one machine's CPU, against plain transformers."""

from __future__ import annotations

import sys

import pytest
from architectures import make
from engines import Mismatch, Oracle
from runners import current_runner

from vllm_pedro import BackboneShape, PedroRequest
from vllm_pedro.architectures import EXPERTS_UP, MODULES

pytestmark = pytest.mark.engine

PROMPTS = [[(31 * row + 7 * i * i + 3 * i) % 128 for i in range(5 + 17 * row)] for row in range(6)]


def generate(llm, prompts, adapters):
    from vllm import SamplingParams

    requests = [None if a is None else PedroRequest(a.name, 1, str(a)) for a in adapters]
    params = SamplingParams(
        temperature=0.0, max_tokens=8, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    return llm.generate(
        [{"prompt_token_ids": p} for p in prompts], params, lora_request=requests, use_tqdm=False
    )


def fail_on(llm, rank, folder):
    """Let one rank be unable to read a folder, or none."""
    path = str(folder)

    def change(worker):
        from vllm_pedro.adapter import read_adapter
        from vllm_pedro.errors import AdapterError

        def load(source, *args, **kwargs):
            if source == path:
                raise AdapterError(f"{source}: cannot be read here")
            return read_adapter(source, *args, **kwargs)

        reader = worker.model_runner.pedro.bank.reader
        reader._load = load if worker.rank == rank else read_adapter

    llm.collective_rpc(change)


def tell_no_other(llm):
    """Let ranks keep their failures to themselves."""

    def change(worker):
        from vllm_pedro.integration import wire

        worker.model_runner.pedro._failed_anywhere = None
        wire.hand_on_failures = lambda *args: None

    llm.collective_rpc(change)


def check_ranks(model, engine, write_adapter, monkeypatch, ranks, **settings):
    """Base rows and two adapters, twice; then an adapter that each rank in turn cannot read."""
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    oracle = Oracle(model, keep=4)
    shape = BackboneShape.from_pretrained(model)
    random = {"scale": 0.2, "down_scale": 15.0}
    everything = [module for module in MODULES[::-1] if shape.widths[module]]
    some = [m for m in ("q_proj", "v_proj", "up_proj", EXPERTS_UP) if m in everything]
    last = write_adapter(model, seed=1, target_modules=some, **random)
    mean = write_adapter(model, seed=2, target_modules=everything, pooling="mean", **random)
    settings = {
        "skip_tokenizer_init": True,
        "block_size": 32,
        "distributed_executor_backend": "mp",
        "pedro_target_modules": MODULES,
        **settings,
    }
    with engine(model, **settings) as llm:
        turns = PROMPTS
        for _ in range(2):
            outputs = generate(llm, turns, [None, last, mean] * 2)
            for output, adapter in zip(outputs, [None, last, mean] * 2, strict=True):
                oracle.check(output, adapter)
            turns = [[*p, *o.outputs[0].token_ids] for p, o in zip(turns, outputs, strict=True)]
        for rank in range(ranks):
            broken = write_adapter(model, seed=10 + rank, target_modules=some, **random)
            fail_on(llm, rank, broken)
            rows = [None, broken, last, broken, mean, None]
            outputs = generate(llm, [[7 + rank, *p] for p in PROMPTS], rows)
            for output, adapter in zip(outputs, rows, strict=True):
                if adapter is broken:
                    assert output.outputs[0].finish_reason == "error"
                    reason = output.outputs[0].stop_reason
                    assert "cannot be read here" in reason or " rank " in reason
                else:
                    oracle.check(output, adapter)
            fail_on(llm, None, broken)
            for output in generate(llm, PROMPTS[:2], [broken] * 2):
                oracle.check(output, broken)
        # A rank that the scheduler does not hear, and that fails alone, is noticed.
        broken = write_adapter(model, seed=20, target_modules=everything, **random)
        tell_no_other(llm)
        fail_on(llm, 0 if settings.get("pipeline_parallel_size") else 1, broken)
        (output,) = generate(llm, PROMPTS[5:], [broken])
        with pytest.raises(Mismatch, match="prompt logprobs differ by"):
            oracle.check(output, broken)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "GPTNeoXForCausalLM", "GlmForCausalLM"])
def test_two_ranks_of_other_kinds(name, engine, write_adapter, monkeypatch, tmp_path):
    """KV heads and experts that are split; Q, K and V by head; an output that is gathered."""
    sizes = {"hidden_size": 128, "intermediate_size": 128}
    if "Moe" in name:
        sizes["moe_intermediate_size"] = 64
    model = make(name, tmp_path / "model", **sizes)
    check_ranks(model, engine, write_adapter, monkeypatch, 2, tensor_parallel_size=2)


@pytest.mark.slow
def test_two_ranks_compiled(tiny, engine, write_adapter, monkeypatch):
    settings = {"tensor_parallel_size": 2, "enforce_eager": False}
    check_ranks(tiny, engine, write_adapter, monkeypatch, 2, **settings)


@pytest.mark.both_runners
def test_two_stages(tiny, engine, write_adapter, monkeypatch):
    # As on a GPU, where V2 schedules a step before the last one's tokens are known.
    settings = {"pipeline_parallel_size": 2, "async_scheduling": current_runner() == "v2"}
    check_ranks(tiny, engine, write_adapter, monkeypatch, 2, **settings)


@pytest.mark.slow
@pytest.mark.both_runners
def test_two_stages_of_two_ranks(tiny, engine, write_adapter, monkeypatch):
    settings = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    check_ranks(tiny, engine, write_adapter, monkeypatch, 4, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_two_ranks_of_ray(kind, tiny, engine, write_adapter, monkeypatch):
    """Where `ray` is installed."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "1")
    paths = {"PYTHONPATH": ":".join(sys.path), "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    ray.init(resources={"cpu_rank": 2}, include_dashboard=False, runtime_env={"env_vars": paths})
    try:
        import ray_on_cpu  # noqa: F401

        settings = {"distributed_executor_backend": "ray", f"{kind}_parallel_size": 2}
        check_ranks(tiny, engine, write_adapter, monkeypatch, 2, **settings)
    finally:
        ray.shutdown()


@pytest.mark.both_runners
def test_two_ranks_that_share_a_kv_head(tiny, engine, write_adapter, monkeypatch):
    check_ranks(tiny, engine, write_adapter, monkeypatch, 2, tensor_parallel_size=2)
