"""A router of vLLM's own project before two servers: adapters by name, while one server dies.

The router is `vllm-router` from PyPI, in an environment of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import venv

import pytest
from engines import Oracle
from server import check_greedy, curl, metrics
from tiny_task import make_folder

from vllm_pedro.bench.servers import HOST, free_port, serve

pytestmark = pytest.mark.engine

VERSION = "0.1.17"
MODELS = ("base", "tenant", "other")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The router's program."""
    place = tmp_path_factory.mktemp("router")
    venv.create(place, with_pip=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
    found = subprocess.run(
        [*pip, f"vllm-router=={VERSION}"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(f"pip cannot install vllm-router: {found.stderr.strip().splitlines()[-1]}")
    return str(place / "bin" / "vllm-router")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("routed") / "model")


@pytest.fixture(scope="module")
def root(model, write_adapter):
    root = model.parent / "root"
    for seed, name in enumerate(MODELS[1:]):
        write_adapter(model, folder=root / name, seed=seed, scale=0.3, down_scale=15.0)
    shutil.copytree(root / "tenant", root / "content")
    return root


@contextlib.contextmanager
def start_server(model, root, number, port):
    flags = ["--served-model-name", "base", "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-model-len", "128", "--max-num-seqs", "8"]
    flags += ["--kv-cache-memory-bytes", str(64 << 20), "--enable-pedro", "--pedro-root", str(root)]
    environment = {"OMP_NUM_THREADS": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    log = model.parent / f"server-{number}.log"
    with serve(model, flags, log, port=port, **environment) as server:
        yield server


@contextlib.contextmanager
def start_router(command, servers, log):
    port = free_port()
    options = [command, "--host", HOST, "--port", str(port), "--policy", "round_robin"]
    options += ["--health-check-interval-secs", "1", "--health-check-timeout-secs", "5"]
    options += ["--health-failure-threshold", "1", "--health-success-threshold", "1"]
    options += ["--prometheus-port", str(free_port())]
    options += ["--worker-urls", *(server.url for server in servers)]
    with open(log, "wb") as output:
        process = subprocess.Popen(options, stdout=output, stderr=subprocess.STDOUT)
    try:
        url, end = f"http://{HOST}:{port}", time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def say(url, name, **more):
    body = {"model": name, "prompt": "Hello", "temperature": 0, "max_tokens": 8, **more}
    status, text = curl(f"{url}/v1/completions", body)
    assert status == 200, text
    return text


def text_of(answer):
    return json.loads(answer)["choices"][0]["text"]


def prefills(server):
    """Prompts with an adapter that a server computed."""
    found = metrics(server.url)
    return sum(value for name, value in found.items() if name.startswith("prefills_total"))


@pytest.mark.skipif(sys.platform != "linux", reason="the router's wheels are for Linux")
def test_requests_by_name_reach_servers_that_come_and_go(command, model, root):
    oracle, expected = Oracle(model), {}
    log, ports = model.parent / "router.log", (free_port(), free_port())
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(start_server(model, root, number, port))
            for number, port in enumerate(ports)
        ]
        for server in servers:
            for name, path in (("tenant", "content"), ("other", "other")):
                body = {"lora_name": name, "lora_path": path}
                assert curl(f"{server.url}/v1/load_lora_adapter", body)[0] == 200
        for name in MODELS:
            answer = json.loads(say(servers[0].url, name, return_token_ids=True))
            (choice,) = answer["choices"]
            adapter = None if name == "base" else root / name
            check_greedy(oracle, choice["prompt_token_ids"], choice["token_ids"], adapter)
            expected[name] = choice["text"]
        assert len({*expected.values()}) == 3
        url = stack.enter_context(start_router(command, servers, log))

        def check(times):
            for _ in range(times):
                for name in MODELS:
                    assert text_of(say(url, name)) == expected[name]

        before = [prefills(server) for server in servers]
        check(3)
        assert all(prefills(s) > b for s, b in zip(servers, before, strict=True))
        chunks = [line[6:] for line in say(url, "tenant", stream=True).splitlines() if line[6:]]
        streamed = (text_of(chunk) for chunk in chunks if chunk.startswith("{"))
        assert "".join(streamed) == expected["tenant"]
        # A server dies while requests come, without a word to anybody.
        os.killpg(servers[1].pid, signal.SIGKILL)
        check(3)
        # It comes back knowing no names but those of the root.
        back = stack.enter_context(start_server(model, root, 2, ports[1]))
        end = time.monotonic() + 60
        while not prefills(back):
            check(1)
            assert time.monotonic() < end, log.read_text()
        check(2)
    assert "panicked" not in log.read_text(errors="replace")
