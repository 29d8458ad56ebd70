"""A thousand adapters, two API server processes, and requests in Punica's mixes."""

from __future__ import annotations

import json
import random
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from safetensors.torch import save_file
from server import check_greedy, curl, metrics

from vllm_pedro import BackboneShape, PedroConfig
from vllm_pedro.adapter import WEIGHTS_NAME, init_adapter
from vllm_pedro.bench.servers import serve
from vllm_pedro.config import CONFIG_NAME

pytestmark = pytest.mark.engine

ADAPTERS = 1000
REQUESTS = 16


def mixes():
    """Adapter numbers by Punica's popularity mixes; few enough to wait for."""
    chance = random.Random(0)
    everything = range(ADAPTERS)
    popular = [1 / (rank + 1) ** 1.5 for rank in everything]
    return {
        "identical": [7] * REQUESTS,
        "distinct": chance.sample(everything, REQUESTS),
        "uniform": [chance.randrange(ADAPTERS // 2) for _ in range(REQUESTS)],
        "Zipf": chance.choices(everything, popular, k=REQUESTS),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory, smol):
    """A thousand folders, each with content of its own, and all tensors that a real one has."""
    from transformers import AutoConfig

    place = tmp_path_factory.mktemp("many")
    shape = BackboneShape.from_hf_config(AutoConfig.from_pretrained(smol))
    config = PedroConfig(r=1, target_modules=["q_proj"], input_norm="rms")
    made = init_adapter(config, shape, scale=0.15).tensors
    tensors = {name: tensor.half() for name, tensor in made.items()}
    bias = "base_model.model.model.layers.{}.vector_generator.up_proj.bias"
    for number in range(ADAPTERS):
        chance = torch.Generator().manual_seed(number)
        for layer in range(0, 30, 3):
            tensors[bias.format(layer)] = (1 + 0.5 * torch.randn(576, generator=chance)).half()
        folder = place / str(number)
        folder.mkdir()
        # Not save_adapter, which waits for the disk each time.
        save_file(tensors, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_bytes(config.to_json())
    return place


@pytest.fixture(scope="module")
def server(folders, smol, tmp_path_factory):
    flags = ["--served-model-name", "smol", "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-model-len", "256", "--kv-cache-memory-bytes", str(128 << 20)]
    flags += ["--max-num-seqs", "8", "--api-server-count", "2"]
    flags += ["--pedro-prompt-length", "first_turn"]
    flags += ["--enable-pedro", "--max-pedros", "4", "--max-cpu-pedros", "16", "--pedro-modules"]
    flags += [f"a{number}={folders / str(number)}" for number in range(ADAPTERS)]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serve(smol, flags, log, OMP_NUM_THREADS="1", VLLM_SERVER_DEV_MODE="1") as it:
        yield it


def test_a_thousand_modules_are_checked_in_seconds(server):
    """By each of the two API servers; content is read when it is asked for."""
    log = server.log.read_text(errors="replace")
    found = re.findall(r"registered 1000 adapters in ([\d.]+) s", log)
    assert len(found) == 2
    print("checked a thousand modules in", found, "s; the server answered after", server.seconds)
    assert max(map(float, found)) < 30  # on a busy machine; 1.5 s on an idle one
    status, text = curl(f"{server.url}/v1/models")
    models = json.loads(text)["data"]
    assert status == 200
    assert len(models) == 1 + ADAPTERS
    assert all(model["parent"] == "smol" for model in models[1:])
    assert "into host memory" not in log


def test_mixes_of_a_thousand_tenants(server, smol_oracle, folders):
    """Every answer is its adapter's, through both API servers and far more adapters than fit."""
    prompt = [(37 * i * i + 11 * i) % 40_000 + 100 for i in range(12)]

    def ask(number):
        # A client of its own makes a connection of its own: the kernel picks the API server.
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)
        answer = client.completions.create(
            model=f"a{number}",
            prompt=prompt,
            max_tokens=4,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return tuple(answer.choices[0].token_ids)

    answers: dict[int, tuple[int, ...]] = {}
    with ThreadPoolExecutor(8) as pool:
        for mix, numbers in mixes().items():
            start = time.perf_counter()
            for number, tokens in zip(numbers, pool.map(ask, numbers), strict=True):
                assert answers.setdefault(number, tokens) == tokens, mix
            print(f"{mix}: {REQUESTS / (time.perf_counter() - start):.1f} requests/s")
    for number in random.Random(1).sample(sorted(answers), 8):
        check_greedy(smol_oracle, prompt, list(answers[number]), folders / str(number))
    assert len(set(answers.values())) > len(answers) / 4
    found = metrics(server.url)
    distinct = len(answers)
    # Statistics go to one of the API servers; what /metrics shows is the sum of both.
    assert found["adapter_loads_total{tier=host}"] >= distinct
    # Host memory is the device on a CPU, and `--max-pedros` limits a step, not what it holds.
    assert found["adapters_resident{tier=host}"] == 16
    assert found["adapters_resident{tier=device}"] == 16
    assert found["adapter_evictions_total{tier=host}"] >= distinct - 16
    kinds = ("device", "host", "disk", "cached", "failed")
    assert sum(found[f"prefills_total{{state={kind}}}"] for kind in kinds) == 4 * REQUESTS
    assert found["prefills_total{state=failed}"] == 0
    assert found["adapters_registered"] == ADAPTERS


def test_run_time_loading_with_several_api_servers_is_off(server, folders):
    """vLLM refuses its switch for it (each process has its own table); so there is no endpoint."""
    body = {"lora_name": "x", "lora_path": str(folders / "0")}
    assert curl(f"{server.url}/v1/load_lora_adapter", body)[0] == 404
    status, text = curl(f"{server.url}/v1/load_pedro_tensors?lora_name=x", body)
    assert status == 400
    assert "one of 2 API servers would know the adapter" in text


def test_what_cannot_be_served_stops_the_start(folders, smol, tmp_path):
    """All of it is named, not just the first."""
    import asyncio
    from types import SimpleNamespace

    from vllm_pedro.integration.frontend.flags import AdapterModules, PedroModulePath
    from vllm_pedro.integration.frontend.models import PedroServingModelsMixin
    from vllm_pedro.integration.frontend.processor import AdapterRegistry
    from vllm_pedro.serving.adapters import AdapterLimits

    class Base:
        def is_base_model(self, name):
            return name == "smol"

    class Models(PedroServingModelsMixin, Base):
        pass

    from transformers import AutoConfig

    limits = AdapterLimits(BackboneShape.from_hf_config(AutoConfig.from_pretrained(smol)), 8)
    models = Models()
    models.engine_client = SimpleNamespace()
    models.input_processor = SimpleNamespace(pedro_registry=AdapterRegistry(limits))
    models.lora_requests = {}
    modules = [PedroModulePath("good", str(folders / "0"))]
    modules += [PedroModulePath("gone", str(tmp_path / "gone"))]
    modules += [PedroModulePath("smol", str(folders / "1"))]
    models.enable_pedro(AdapterModules([], modules))
    with pytest.raises(ValueError, match=r"2 cannot be served: gone: .*found nothing; smol: the"):
        asyncio.run(models.init_static_loras())


def test_a_server_can_pool_the_first_turn_by_default(server):
    chat = [{"role": "user", "content": "Which river runs through Rome?"}]
    said = []
    for _ in range(2):
        body = {"model": "a1", "messages": chat, "max_tokens": 4, "temperature": 0}
        for path in ("chat/completions", "messages"):  # OpenAI's and Anthropic's
            request = urllib.request.Request(
                f"{server.url}/v1/{path}",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=300) as answer:
                said.append(
                    (answer.headers["x-pedro-prompt"], answer.headers["x-pedro-prompt-length"])
                )
                json.load(answer)
        chat += [
            {"role": "assistant", "content": "The Tiber."},
            {"role": "user", "content": "And Paris?"},
        ]
    assert len(set(said)) == 1
    assert said[0][0] == "first_turn"
    body = {"model": "a1", "messages": chat[:-1], "max_tokens": 1}
    body |= {"vllm_xargs": {"pedro_prompt_length": "whole"}}
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        assert "x-pedro-prompt" not in answer.headers
