"""Every route of vLLM's server that answers for a model answers for a PEDRO adapter's name.

Each is asked for the base model, a LoRA, an adapter in use, and a module that nobody asked for yet.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from engines import Oracle, write_lora
from server import check_greedy
from tiny_task import make_folder

from vllm_pedro.bench.servers import SHARED, USUAL, serve

pytestmark = pytest.mark.engine

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
CHAT = [{"role": "user", "content": "Hello"}]
FEW = {"temperature": 0, "max_tokens": 8}

MODEL_ROUTES = {
    "/v1/completions": {"prompt": PROMPT, "return_token_ids": True, **FEW},
    "/v1/chat/completions": {"messages": CHAT, "return_token_ids": True, **FEW},
    "/v1/chat/completions/batch": {"messages": [CHAT, CHAT], **FEW},
    "/v1/messages": {"messages": CHAT, **FEW},
    "/v1/messages/count_tokens": {"messages": CHAT},
    "/cohere/v2/chat": {"messages": CHAT, **FEW},
    "/v1/responses": {"input": "Hello", "temperature": 0, "max_output_tokens": 8},
    "/inference/v1/generate": {"token_ids": PROMPT, "sampling_params": FEW},
    "/generative_scoring": {"query": "Hi", "items": ["a", "b"], "label_token_ids": [30, 40]},
    "/invocations": {"messages": CHAT, **FEW},
    "/v1/systemone": {"state": "x", "questions": {"a": {"type": "bool", "question": "b?"}}},
    "/tokenize": {"messages": CHAT},
    "/detokenize": {"tokens": PROMPT},
    "/v1/chat/completions/render": {"messages": CHAT, **FEW},
    "/v1/completions/render": {"prompt": "Hello", **FEW},
    "/v1/messages/render": {"messages": CHAT, **FEW},
    "/v1/responses/render": {"input": "Hello"},
    "/cohere/v2/chat/render": {"messages": CHAT, **FEW},
    "/v1/chat/completions/derender": {
        "generate_response": {"request_id": "x", "choices": [{"index": 0, "token_ids": PROMPT}]}
    },
    "/v1/completions/derender": {
        "generate_responses": [{"request_id": "x", "choices": [{"index": 0, "token_ids": PROMPT}]}]
    },
}
"""Routes whose requests name a model, and a request of each."""

GENERATING = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/messages",
    "/cohere/v2/chat",
    "/v1/responses",
    "/inference/v1/generate",
    "/generative_scoring",
    "/invocations",
}
"""Those in whose answer the adapter has a part."""

WITHOUT_MODEL = {
    "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc",
    "/health", "/load", "/metrics", "/ping", "/version", "/kv_event_sources",
    "/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
    "/adapters", "/adapters/{adapter_name}",
    "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel",
    "/inference/v1/abort_requests", "/is_scaling_elastic_ep", "/scale_elastic_ep",
}  # fmt: skip
"""Routes whose requests name none."""

DEVELOPMENT = {
    "/abort_requests", "/collective_rpc", "/finish_weight_update", "/get_world_size",
    "/init_weight_transfer_engine", "/is_paused", "/is_sleeping", "/pause",
    "/release_kv_cache_memory", "/reset_encoder_cache", "/reset_mm_cache", "/reset_prefix_cache",
    "/resume", "/server_info", "/shutdown_weight_transfer_engine", "/sleep",
    "/start_draft_weight_update", "/start_weight_update", "/update_weight_version",
    "/update_weights", "/wake_up", "/weight_checker", "/weight_info",
    "/v1/load_pedro_tensors",
}  # fmt: skip
"""With VLLM_SERVER_DEV_MODE; they name none either."""

OTHER_MODELS = {"/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"}
"""Of models that an engine with PEDRO refuses: see `integration/checks.py`."""

SCORES = {"/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"}

POOLING = {
    "embed": {"/pooling", "/v1/embeddings", "/v2/embed", *SCORES},
    "classify": {"/pooling", "/classify", *SCORES},
}
"""Of pooling engines; `test_pooling.py` asks them, except for what has one function with another:
scores by other names, and Cohere's form of embeddings."""

NEEDS_THE_COHERE_SDK = {"/cohere/v2/chat", "/cohere/v2/chat/render"}

LAZY = 60


def paths(routes):
    """Paths of an app, those of routers that it includes too."""
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from paths(inner.routes)
        else:
            yield route.path


@pytest.mark.parametrize("task", ["generate", "embed", "classify", "transcription"])
def test_no_route_is_unknown(task, model, monkeypatch):
    """A new one, in the next vLLM: put it where it belongs above, and try it."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for name in ("ALLOW_RUNTIME_LORA_UPDATING", "ENABLE_COHERE_API", "SERVER_DEV_MODE"):
        monkeypatch.setenv(f"VLLM_{name}", "1")
    arguments = ["--model", "none", "--enable-scale-out"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
    tasks = ("generate", "transcription", "realtime") if task == "transcription" else (task,)
    config = None
    if task in POOLING:
        from vllm.engine.arg_utils import EngineArgs

        one = {"num_labels": 1}
        engine = EngineArgs(str(model), runner="pooling", convert=task, hf_overrides=one)
        config = engine.create_model_config()
    found = set(paths(build_app(args, tasks, config).routes))
    known = {*MODEL_ROUTES, *WITHOUT_MODEL, *DEVELOPMENT}
    if task in POOLING:
        assert not found & GENERATING - {"/invocations"}
        assert found - known == POOLING[task]
        return
    assert found - known == (OTHER_MODELS if task == "transcription" else set())
    assert known - found <= NEEDS_THE_COHERE_SDK


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("routes") / "model")


@pytest.fixture(scope="module")
def adapter(model, write_adapter):
    return write_adapter(model, folder=model.parent / "pedro", seed=1, scale=0.3, down_scale=15.0)


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


ENGINE = ["--served-model-name", "base", "--enforce-eager", "--dtype", "float32"]
ENGINE += ["--max-model-len", "128", "--max-num-seqs", "8"]
ENGINE += ["--kv-cache-memory-bytes", str(64 << 20), "--enable-pedro", "--pedro-modules"]


@pytest.fixture(scope="module")
def sdk(tmp_path_factory):
    """Where Cohere's SDK is, without which vLLM does not have its routes; or why it is nowhere."""
    place = tmp_path_factory.mktemp("sdk")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
    packages = ["cohere==7.3.1", "fastavro", "httpx-sse"]
    done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        return None, f"pip cannot install cohere: {(done.stderr.strip() or '?').splitlines()[-1]}"
    return place, ""


@pytest.fixture(scope="module")
def server(model, adapter, sdk):
    lora = write_lora(model, model.parent / "lora", scale=0.5)
    flags = [*ENGINE, f"used={adapter}", f"text={adapter}"]
    flags += [f"lazy-{number}={adapter}" for number in range(LAZY)]
    flags += ["--enable-scale-out", "--enable-lora", "--max-loras", "2"]
    flags += ["--lora-modules", f"lora={lora}"]
    environment = {
        "OMP_NUM_THREADS": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_ENABLE_COHERE_API": "1",
        "VLLM_ENABLE_RESPONSES_API_STORE": "1",
    }
    if sdk[0] is not None:
        before = filter(None, [os.environ.get("PYTHONPATH"), str(sdk[0])])
        environment["PYTHONPATH"] = os.pathsep.join(before)
    with serve(model, flags, model.parent / "server.log", **environment) as it:
        assert ask(it, "/v1/completions", {"model": "used", "prompt": PROMPT, **FEW})[0] == 200
        yield it


@pytest.fixture(scope="module")
def lazy():
    """Names of modules that nobody asked for yet."""
    return (f"lazy-{number}" for number in itertools.count())


def ask(server, path, body=None, method=None, **headers):
    """Status and answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    request = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
            return answer.status, json.loads(text) if text.startswith(("{", "[")) else text
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


CHANGING = {"id", "created", "created_at", "completed_at", "request_id", "message_id", "model"}


def essence(answer):
    """What an answer says, without what differs each time."""
    if isinstance(answer, dict):
        return {k: essence(v) for k, v in answer.items() if k not in CHANGING}
    return [essence(value) for value in answer] if isinstance(answer, (list, tuple)) else answer


def names_in(answer):
    """The models that an answer says it is from."""
    if isinstance(answer, list):
        return {name for value in answer for name in names_in(value)}
    return {answer["model"]} if isinstance(answer, dict) and answer.get("model") else set()


@pytest.mark.parametrize("path", MODEL_ROUTES)
def test_a_route_answers_for_an_adapter(path, server, sdk, lazy):
    if path in NEEDS_THE_COHERE_SDK and sdk[0] is None:
        pytest.skip(sdk[1])

    def say(name):
        status, answer = ask(server, path, MODEL_ROUTES[path] | {"model": name})
        if status == 200:
            assert names_in(answer) <= {name}
        return [status, essence(answer)]

    base, lora, used = say("base"), say("lora"), say("used")
    assert say(next(lazy)) == used
    assert used[0] == lora[0]
    if path == "/v1/systemone":  # vLLM serves it for models of one kind
        assert used[0] == base[0] == 501
        return
    assert used[0] == 200
    assert say("nobody")[0] == 404
    if path in GENERATING:
        assert used != base
        assert used != lora
    else:
        assert used == base


def test_answers_are_the_references(server, lazy, adapter, oracle):
    """And so those of the routes that give the same tokens, as text."""
    for name, path in (("base", None), ("used", adapter), (next(lazy), adapter)):
        _, answer = ask(server, "/v1/chat/completions", MODEL_ROUTES["/v1/chat/completions"]
                        | {"model": name})  # fmt: skip
        chat = answer["choices"][0]
        check_greedy(oracle, answer["prompt_token_ids"], chat["token_ids"], path)
        text = chat["message"]["content"]
        _, answer = ask(server, "/v1/messages", {"model": name, "messages": CHAT, **FEW})
        assert answer["content"][0]["text"] == text
        batch = {"model": name, "messages": [CHAT, CHAT], **FEW}
        _, answer = ask(server, "/v1/chat/completions/batch", batch)
        assert [choice["message"]["content"] for choice in answer["choices"]] == [text, text]
        _, answer = ask(server, "/invocations", {"model": name, "messages": CHAT, **FEW})
        assert answer["choices"][0]["message"]["content"] == text
        body = {"model": name, "token_ids": PROMPT, "sampling_params": FEW}
        _, answer = ask(server, "/inference/v1/generate", body)
        check_greedy(oracle, PROMPT, answer["choices"][0]["token_ids"], path)


def test_what_is_rendered_generates_as_the_adapter(server, lazy, adapter, oracle):
    """The two halves of a server that is split in two."""
    name = next(lazy)
    _, rendered = ask(
        server, "/v1/chat/completions/render", {"model": name, "messages": CHAT, **FEW}
    )
    assert rendered["model"] == name
    status, answer = ask(server, "/inference/v1/generate", rendered)
    assert status == 200
    check_greedy(oracle, rendered["token_ids"], answer["choices"][0]["token_ids"], adapter)


def test_responses_in_the_background_and_one_after_another(server, lazy):
    def respond(name, **more):
        body = MODEL_ROUTES["/v1/responses"] | {"model": name, "store": True, **more}
        status, answer = ask(server, "/v1/responses", body)
        assert status == 200
        for _ in range(200):
            if answer["status"] not in ("queued", "in_progress"):
                break
            time.sleep(0.05)
            _, answer = ask(server, f"/v1/responses/{answer['id']}")
        assert answer["model"] == name
        texts = [part["text"] for item in answer["output"] for part in item["content"]]
        return answer["id"], texts

    first = {name: respond(name) for name in ("base", "used")}
    assert first["base"][1] != first["used"][1]
    assert respond(next(lazy), background=True)[1] == first["used"][1]
    # The second turn, after an answer of the base model and after one of its own.
    more = {"input": "Again", "background": True}
    for start in first.values():
        turns = {
            name: respond(name, previous_response_id=start[0], **more)[1]
            for name in ("base", "used", next(lazy))
        }
        base, used, unused = turns.values()
        assert used == unused != base


def test_sagemakers_names_for_adapters(server, adapter, lazy):
    """A header of its own, and adapters loaded and unloaded in its way."""
    body = {"messages": CHAT, **FEW}
    expected = essence(ask(server, "/v1/chat/completions", {"model": "used", **body}))
    header = "X_Amzn_SageMaker_Adapter_Identifier"
    for name in ("used", next(lazy)):
        assert essence(ask(server, "/invocations", body, **{header: name})) == expected
        # As upstream has it, the header counts.
        named = {"model": "base", **body}
        assert essence(ask(server, "/invocations", named, **{header: name})) == expected
    plain = essence(ask(server, "/v1/chat/completions", {"model": "base", **body}))
    assert essence(ask(server, "/invocations", body)) == plain
    assert ask(server, "/adapters", {"name": "sage", "src": str(adapter)})[0] == 200
    assert essence(ask(server, "/invocations", body, **{header: "sage"})) == expected
    assert ask(server, "/adapters/sage", method="DELETE")[0] == 200
    assert ask(server, "/invocations", {"model": "sage", **body})[0] == 404
    assert ask(server, "/invocations", body, **{header: "sage"})[0] == 404
    assert ask(server, "/invocations", [])[0] == 400


def test_an_adapter_named_as_a_kind_of_content(server):
    """vLLM's LoRAs for modalities go by name; PEDRO's adapters have none."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    plain, again = (
        essence(ask(server, "/v1/chat/completions", {"model": "base", "messages": chat, **FEW}))
        for chat in (CHAT, parts)
    )
    assert again == plain
    named = ask(server, "/v1/chat/completions", {"model": "text", "messages": parts, **FEW})
    assert essence(named) != plain


STREAMED = {
    "/v1/completions": lambda event: event["choices"][0]["text"],
    "/v1/chat/completions": lambda event: event["choices"][0]["delta"].get("content"),
    "/v1/messages": lambda event: event.get("delta", {}).get("text"),
    "/v1/responses": lambda event: event["type"].endswith("text.delta") and event["delta"],
}


def test_streams_of_modules_that_nobody_asked_for(server, lazy):
    for path, text in STREAMED.items():
        body = MODEL_ROUTES[path] | {"stream": True}
        found = []
        for name in ("base", "used", next(lazy)):
            status, answer = ask(server, path, body | {"model": name})
            assert status == 200
            lines = [line[6:] for line in answer.splitlines() if line.startswith("data: {")]
            found.append("".join(text(json.loads(line)) or "" for line in lines))
        base, used, unused = found
        assert used == unused != base


def test_a_batch_from_a_file(model, adapter, oracle, tmp_path):
    """`python -m vllm.entrypoints.openai.run_batch`, which is `vllm run-batch`."""
    rows = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": name, "messages": CHAT, "return_token_ids": True, **FEW},
        }
        for name in ("base", "first", "second", "nobody")
    ]
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "--model", str(model)]
    command += ["-i", str(asked), "-o", str(answered), *ENGINE]
    command += [f"first={adapter}", f"second={adapter}"]
    environment = {**os.environ, **USUAL, **SHARED, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["custom_id"]: row for row in map(json.loads, answered.read_text().splitlines())}
    assert found["nobody"]["response"]["status_code"] == 404
    for name, path in (("base", None), ("first", adapter), ("second", adapter)):
        body = found[name]["response"]["body"]
        assert body["model"] == name
        check_greedy(oracle, body["prompt_token_ids"], body["choices"][0]["token_ids"], path)
