"""A server whose adapters are not in folders: a hub on loopback has them, or a training loop."""

from __future__ import annotations

import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import openai
import pytest
import yaml
from engines import write_lora
from hub import fake_hub
from server import check_greedy, curl
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_pedro.adapter import load_adapter
from vllm_pedro.adapter.memory import to_bytes
from vllm_pedro.bench.servers import serve

pytestmark = pytest.mark.engine

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROMPT = [(31 * k * k + 7 * k) % 128 for k in range(20)]


@pytest.fixture(scope="module")
def hub(tiny_adapters, tiny, tmp_path_factory):
    with fake_hub() as it:
        it.commit("org/static", tiny_adapters["static"], "v1")
        it.commit("org/moving", tiny_adapters["last"])
        it.commit("org/broken", tiny_adapters["last"], **{"adapter_config.json": b"{}"})
        it.commit("org/lora", write_lora(tiny, tmp_path_factory.mktemp("lora") / "lora"))
        yield it


@pytest.fixture(scope="module")
def server(hub, tiny, tmp_path_factory):
    flags = ["--served-model-name", "tiny", "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-model-len", "128", "--kv-cache-memory-bytes", str(1 << 26)]
    flags += ["--max-num-seqs", "4", "--skip-tokenizer-init", "--block-size", "32"]
    flags += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    flags += ["--enable-pedro", "--pedro-modules", "given=org/static@v1"]
    folder = tmp_path_factory.mktemp("server")
    variables = {"OMP_NUM_THREADS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    variables["VLLM_SERVER_DEV_MODE"] = "1"
    with serve(tiny, flags, folder / "log", **variables, **hub.variables(folder)) as it:
        yield it


def tokens_of(server, model):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=120)
    answer = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=8,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return answer.choices[0].token_ids


def load(server, name, path, **more):
    body = {"lora_name": name, "lora_path": path, **more}
    return curl(f"{server.url}/v1/load_lora_adapter", body)


def test_a_module_of_the_command_line(server, hub, tiny_oracle, tiny_adapters):
    check_greedy(tiny_oracle, PROMPT, tokens_of(server, "given"), tiny_adapters["static"])


def test_a_repository_is_loaded_and_asked_again_when_it_is_loaded_again(
    server, hub, tiny_oracle, tiny_adapters
):
    assert load(server, "moving", "org/moving")[0] == 200
    check_greedy(tiny_oracle, PROMPT, tokens_of(server, "moving"), tiny_adapters["last"])
    hub.commit("org/moving", tiny_adapters["mean"])
    check_greedy(tiny_oracle, PROMPT, tokens_of(server, "moving"), tiny_adapters["last"])
    assert load(server, "moving", "org/moving", load_inplace=True)[0] == 200
    check_greedy(tiny_oracle, PROMPT, tokens_of(server, "moving"), tiny_adapters["mean"])


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("org/nothing", "neither a folder here nor a repository of"),
        ("org/static@v2", "no such revision"),
        ("org/broken", "adapter_config.json: peft_type: expected 'PEDRO'"),
    ],
)
def test_what_cannot_be_had_is_a_400_with_the_reason(path, reason, server):
    status, text = load(server, "bad", path)
    assert status == 400
    assert path.partition("@")[0] in text
    assert reason in text
    assert "/hub/models--" not in text


def test_a_lora_of_the_hub_is_loras(server, hub):
    assert load(server, "lora", "org/lora")[0] == 200
    assert tokens_of(server, "lora") != tokens_of(server, "tiny")


def test_others_are_answered_while_the_hub_hangs(server, hub, tiny_oracle, tiny_adapters):
    hub.commit("org/slow", tiny_adapters["max"])
    hub.goes_on.clear()
    answers: list[tuple[int, str]] = []
    thread = threading.Thread(target=lambda: answers.append(load(server, "slow", "org/slow")))
    thread.start()
    try:
        while not any("org/slow" in path for _, path in hub.asked):
            thread.join(0.01)
        for name in ("tiny", "given"):
            tokens = tokens_of(server, name)
            check_greedy(tiny_oracle, PROMPT, tokens, {"given": tiny_adapters["static"]}.get(name))
        assert not answers
    finally:
        hub.goes_on.set()
        thread.join(60)
    assert answers[0][0] == 200
    check_greedy(tiny_oracle, PROMPT, tokens_of(server, "slow"), tiny_adapters["max"])


def send(server, name, data, **query):
    """An adapter's tensors to the development route; status and text."""
    words = urllib.parse.urlencode({"lora_name": name, **query})
    url = f"{server.url}/v1/load_pedro_tensors?{words}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_tensors_are_loaded_and_swapped(server, tiny_oracle, tiny_adapters):
    for number, name in enumerate(("last", "mean", "other", "last")):
        adapter = load_adapter(tiny_adapters[name])
        data = to_bytes(adapter.config, adapter.tensors)
        status, text = send(server, "policy", data, load_inplace=number > 0)
        assert status == 200, text
        check_greedy(tiny_oracle, PROMPT, tokens_of(server, "policy"), tiny_adapters[name])
    assert send(server, "policy", data)[0] == 400  # as of a folder: already loaded
    assert curl(f"{server.url}/v1/unload_lora_adapter", {"lora_name": "policy"})[0] == 200


def test_tensors_that_cannot_be_served_are_refused(server, tiny_adapters):
    adapter = load_adapter(tiny_adapters["last"])
    good = to_bytes(adapter.config, adapter.tensors)
    plain = (tiny_adapters["last"] / "adapter_model.safetensors").read_bytes()
    half = rb'{"__metadata__": {"adapter_config": "\ud800"}}'  # of a surrogate pair
    broken = {name: tensor / 0 for name, tensor in adapter.tensors.items()}
    for data, reason in [
        (b"", "expected a safetensors file, found 0 other bytes"),
        (good[:-4], "the file is truncated"),
        (len(half).to_bytes(8, "little") + half, "adapter_config: 'utf-8' codec can't encode"),
        (plain, "the safetensors metadata has no 'adapter_config'"),
        (to_bytes(adapter.config, broken), "expected finite values"),
        (bytes(64 << 20), "the body has 67108864 bytes"),
    ]:
        status, text = send(server, "bad", data)
        assert status == 400
        assert reason in text
        assert "/dev/shm" not in text
    assert send(server, "../bad", good)[0] == 400
    status, text = send(server, "tiny", good)
    assert status == 400, text


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist(server, tiny_adapters):
    """After requests of all kinds; labels that queries choose by have the values that they name."""
    adapter = load_adapter(tiny_adapters["max"])
    assert send(server, "seen", to_bytes(adapter.config, adapter.tensors))[0] == 200
    tokens_of(server, "seen")
    status, text = curl(f"{server.url}/metrics")
    assert status == 200
    samples = [line for line in text.splitlines() if line and not line.startswith("#")]
    names = {re.split(r"[{ ]", line)[0] for line in samples}
    queries = re.findall(r'"expr": "(.*)"', (DEPLOY / "grafana.json").read_text())
    rules = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert len(queries) > 10
    queries += [rule["expr"] for rule in rules]
    for query in queries:
        asked = re.findall(r"vllm:\w+", query)
        assert asked, query
        assert set(asked) <= names, query
        for label in re.findall(r"by \(([\w, ]+)\)", query):
            for each in set(label.split(", ")) - {"le"}:
                assert any(f"{each}=" in line for line in samples if asked[0] in line), query
        for label, value in re.findall(r'(\w+)="(\w+)"', query):
            assert any(f'{label}="{value}"' in line for line in samples if asked[0] in line), query


def test_the_manifest_starts_a_server_that_answers_its_probes(server):
    deployment = next(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    probes = [container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")]
    for path in {probe["httpGet"]["path"] for probe in probes}:
        assert curl(f"{server.url}{path}")[0] == 200
    parser = make_arg_parser(FlexibleArgumentParser())
    args = parser.parse_args(["--model", *container["args"]])
    assert args.enable_pedro
    assert args.pedro_root == "/adapters"
