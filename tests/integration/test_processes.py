"""Engines as users start them: the engine core in a process of its own, `LLM` and `AsyncLLM`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hub import fake_hub

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]

PROGRAM = """
import asyncio, json, sys
from vllm import LLM, SamplingParams
from vllm_pedro import PedroRequest


def request_of(row):
    name, path, length = row["adapter"]
    return PedroRequest(name, 1, path, prompt_length=length) if path else None


async def ask_async(settings, rows, params):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

    async def ask(i, row):
        prompt = {"prompt_token_ids": row["prompt"]}
        async for output in engine.generate(prompt, params, str(i), lora_request=request_of(row)):
            pass
        return list(output.outputs[0].token_ids)

    try:
        bad = {"prompt": [1, 2, 3], "adapter": ["bad", "/nowhere", None]}
        answers = await asyncio.gather(
            *(ask(i, row) for i, row in enumerate([*rows, bad])), return_exceptions=True
        )
    finally:
        engine.shutdown()
    return answers[:-1], f"{type(answers[-1]).__name__}: {answers[-1]}"


def main():
    settings, rows = json.load(sys.stdin)
    params = SamplingParams(temperature=0.0, max_tokens=8, detokenize=False, ignore_eos=True)
    llm = LLM(**settings)
    outputs = llm.generate(
        [{"prompt_token_ids": row["prompt"]} for row in rows],
        params,
        lora_request=[request_of(row) for row in rows],
        use_tqdm=False,
    )
    offline = [list(o.outputs[0].token_ids) for o in outputs]
    llm.llm_engine.engine_core.shutdown()
    online, refusal = asyncio.run(ask_async(settings, rows, params))
    print("RESULT" + json.dumps([offline, online, refusal]))


if __name__ == "__main__":
    main()
"""


def test_requests_reach_an_engine_in_another_process(tiny, tiny_oracle, write_adapter, tmp_path):
    """One of them names a repository of the hub."""
    adapters = [
        None,
        write_adapter(tiny, seed=1, scale=0.2, down_scale=15.0),
        write_adapter(tiny, seed=2, scale=0.2, down_scale=15.0, pooling="mean"),
    ]
    rows = []
    for i in range(6):
        path = adapters[i % 3]
        length = 9 if i == 4 else None
        path = "org/name" if i == 5 else path and str(path)
        prompt = [(31 * i + 7 * k * k + 3 * k) % 128 for k in range(12 + 5 * i)]
        rows.append({"prompt": prompt, "adapter": [f"a{i}", path, length]})
    settings = {
        "model": str(tiny),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "block_size": 32,
        "kv_cache_memory_bytes": 1 << 26,
        "enable_pedro": True,
        "max_pedros": 1,
    }
    with fake_hub() as hub:
        hub.commit("org/name", adapters[2])
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps([settings, rows]),
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **hub.variables(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
            timeout=400,
        )
    # Twice asked, by two engines.
    assert sorted(hub.downloads()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert done.returncode == 0, done.stderr[-4000:]
    offline, online, refusal = json.loads(done.stdout.partition("RESULT")[2])
    assert "expected an adapter folder" in refusal
    for answers in (offline, online):
        for i, (row, tokens) in enumerate(zip(rows, answers, strict=True)):
            output = SimpleNamespace(
                prompt_token_ids=row["prompt"],
                prompt_logprobs=None,
                outputs=[SimpleNamespace(token_ids=tokens)],
            )
            tiny_oracle.check(output, adapters[i % 3], row["adapter"][2])
