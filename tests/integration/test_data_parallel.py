"""Two engines behind one server: each has its own adapters, vectors, caches and counts."""

from __future__ import annotations

import re
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from scenarios import tokens
from server import check_greedy, curl

from vllm_pedro.bench.servers import serve

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def server(request, tiny, tmp_path_factory):
    """Two engines, each of one rank or of two."""
    flags = ["--served-model-name", "tiny", "--skip-tokenizer-init", "--enforce-eager"]
    flags += ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8"]
    flags += ["--kv-cache-memory-bytes", str(1 << 26), "--enable-pedro"]
    flags += ["--data-parallel-size", "2", "--api-server-count", "1"]
    flags += ["--tensor-parallel-size", str(request.param)]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with serve(tiny, flags, log, OMP_NUM_THREADS="1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as it:
        yield it


def by_engine(server, name):
    """A metric's value of each engine."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = defaultdict(float)
    for engine, value in re.findall(rf'vllm:pedro_{name}{{engine="(\d)".*}} (\S+)', text):
        found[int(engine)] += float(value)
    return found


def load(server, name, path, **more):
    body = {"lora_name": name, "lora_path": str(path), **more}
    return curl(f"{server.url}/v1/load_lora_adapter", body)[0]


def test_each_engine_serves_swaps_and_counts(server, tiny_oracle, tiny_adapters):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=300)
    adapters = {"a": tiny_adapters["last"], "b": tiny_adapters["mean"]}
    for name, path in adapters.items():
        assert load(server, name, path) == 200

    def ask(number):
        prompt = tokens(20 + number, number)
        name = ("a", "tiny", "b")[number % 3]
        answer = client.completions.create(
            model=name,
            prompt=prompt,
            max_tokens=6,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return prompt, answer.choices[0].token_ids, adapters.get(name)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(24)))
        assert load(server, "a", tiny_adapters["other"], load_inplace=True) == 200
        adapters["a"] = tiny_adapters["other"]
        answers += pool.map(ask, range(24, 48))
    for answer in answers:
        check_greedy(tiny_oracle, *answer)
    deadline = time.monotonic() + 10
    while sum(by_engine(server, "prefills_total").values()) < 32 and time.monotonic() < deadline:
        time.sleep(0.1)
    prefills = by_engine(server, "prefills_total")
    assert sum(prefills.values()) == 32
    assert min(prefills[engine] for engine in (0, 1)) >= 8, prefills
    # The content that "a" had is gone from both.
    assert by_engine(server, "adapters_resident") == {0: 4, 1: 4}  # of two tiers, which are one
    for name in adapters:
        assert curl(f"{server.url}/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
    assert by_engine(server, "adapters_resident") == {0: 0, 1: 0}
    assert by_engine(server, "adapters_registered") == {0: 0, 1: 0}
