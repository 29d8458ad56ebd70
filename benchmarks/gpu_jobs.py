"""What `gpu_check.py` runs beside its timed engines: exactness, a model's answers, a server."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_operators import MODELS

from vllm_pedro import BackboneShape, PedroConfig, PedroModel, PedroRequest
from vllm_pedro.bench.adapters import MODULES, write_adapters, write_pedro
from vllm_pedro.bench.servers import serve
from vllm_pedro.demo import QUESTIONS
from vllm_pedro.model.reference import NEAR_TIE_MARGIN, reference_logits, reference_score


def write_model(name: str, folder: Path, weights: bool = False) -> Path:
    """A Llama of this shape: with random float32 weights, or its configuration alone."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        **MODELS[name],
        max_position_embeddings=40960,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    if weights:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Words `w0`, `w1`, ...: a server wants a tokenizer, whatever it is asked."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1").save_pretrained(folder)


def write_strong_adapters(model: Path, folder: Path, count: int, scale: float) -> list[Path]:
    """Adapters whose vectors are far enough from one to change what a random model says."""
    shape = BackboneShape.from_pretrained(model)
    config = PedroConfig(input_norm="rms", target_modules=list(MODULES))
    return [
        write_pedro(folder / f"strong-{number}", shape, config, number + 1, scale)
        for number in range(count)
    ]


def rows_of(command: list[str], deadline: float, **environment: str) -> Iterator[dict[str, Any]]:
    """Start a process; what it prints after `RESULT`, as it comes, and why it failed, if it did.

    What is left of it and of its children at `deadline` (of `time.monotonic`) is ended.
    """
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(deadline - time.monotonic(), 0.1), end)
        timer.start()
        try:
            for line in process.stdout or ():
                if line.startswith("RESULT "):
                    yield json.loads(line.removeprefix("RESULT "))
            status = process.wait()
        finally:
            timer.cancel()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        if late.is_set():
            yield {"error": "stopped: no time left"}
        elif status:
            yield {"error": f"exit status {status}: {said.read().strip()[-1500:]}"}


def run_task(task: dict[str, Any], deadline: float, **environment: str) -> Iterator[dict[str, Any]]:
    """Run a task of this file in a process of its own."""
    yield from rows_of([__file__, json.dumps(task)], deadline, **environment)


def fuzz(
    script: Path, seconds: float, seed: int, flags: list[str], deadline: float, **environment: str
) -> Iterator[dict[str, Any]]:
    """A sample of the schedule fuzzer, which is a script of the tests and may not be here."""
    if not script.is_file():
        yield {"skipped": f"{script.name} is not here"}
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [str(script), "--seed", str(seed), "--cases", "100000", "--json", str(report)]
        command += ["--minutes", str(seconds / 60), *flags]
        errors = list(rows_of(command, deadline, **environment))
        found = json.loads(report.read_text()) if report.is_file() else {}
    if found.get("failures"):
        yield {"cases": found["cases"], "wrong": [str(f)[:400] for f in found["failures"][:5]]}
    elif errors or not found:
        yield from errors or [{"error": "no report"}]
    else:
        yield {"cases": found["cases"]}


# Tasks -------------------------------------------------------------------------------------------


def start_llm(task: dict[str, Any], **settings: Any) -> Any:
    """An engine in this process or, on a GPU, in one that vLLM starts."""
    from vllm import LLM

    settings = {"max_model_len": 512, "max_num_seqs": 16, "seed": 0, **settings}
    if task["device"] == "cpu":
        settings |= {"kv_cache_memory_bytes": 1 << 27, "distributed_executor_backend": "uni"}
    else:  # others are on the card too
        settings |= {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.02}
    if task["mode"] == "eager":
        settings["enforce_eager"] = True
    elif task["mode"] == "compiled":
        settings["compilation_config"] = {"cudagraph_mode": "NONE"}
    return LLM(model=task["model"], skip_tokenizer_init=True, enable_pedro=True, **settings)


def generate(llm: Any, rows: list[tuple[list[int], str | None]], params: Any) -> list[Any]:
    """Answers to `(prompt, adapter's folder or None)`, in one batch."""
    numbers = {path: number for number, path in enumerate(sorted({p for _, p in rows if p}), 1)}
    requests = [path and PedroRequest(Path(path).name, numbers[path], path) for _, path in rows]
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in rows],
        params,
        lora_request=requests,
        use_tqdm=False,
    )


def with_adapters(backbone: Any, rows: list[tuple[list[int], str | None]]) -> Any:
    """For each adapter of `rows`, None too: its model and the numbers of its rows."""
    for adapter in {path: None for _, path in rows}:
        model = backbone if adapter is None else PedroModel.from_pretrained(backbone, adapter)
        yield adapter, model, [i for i, (_, path) in enumerate(rows) if path == adapter]
        if adapter is not None:
            model.unload()


def task_exact(task: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and prompt log probabilities of a mixed batch, against the reference."""
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    prefix = task["prefix"]
    llm = start_llm(task, dtype="float32", max_pedros=4, enable_prefix_caching=prefix)
    vocabulary = llm.model_config.get_vocab_size()
    adapters: list[str | None] = [None, *task["adapters"]]
    # One-token prompts and repeated ones: they look like decodes to a graph.
    lengths = [1, 7, 33, 64, 1, 17, 40, 5]
    prompts = [
        [(53 * i + 17 * t * t + t) % vocabulary for t in range(n)] for i, n in enumerate(lengths)
    ]
    rows = [(p, adapters[i % len(adapters)]) for i, p in enumerate(prompts)]
    rows += [(prompts[3], adapters[1]), (prompts[0], adapters[1]), (prompts[1], None)]
    params = SamplingParams(
        temperature=0.0, max_tokens=12, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    backbone = AutoModelForCausalLM.from_pretrained(
        task["model"], dtype=torch.float32, attn_implementation="eager"
    )
    wrong, ties, worst = [], 0, 0.0
    for attempt in range(2):  # the second one finds cached prompts
        if prefix:
            params.prompt_logprobs = None if attempt else 0
        outputs = generate(llm, rows, params)
        for _, model, members in with_adapters(backbone, rows):
            for index in members:
                prompt, output = rows[index][0], outputs[index]
                tokens = list(output.outputs[0].token_ids)
                expected = reference_score(model, prompt, tokens, None)
                if output.prompt_logprobs is not None and len(prompt) > 1:
                    pairs = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
                    got = [entry[token].logprob for entry, token in pairs]
                    errors = zip(got, expected.prompt_logprobs, strict=True)
                    worst = max(worst, *(abs(a - b) for a, b in errors))
                for step, (token, best) in enumerate(zip(tokens, expected.greedy, strict=True)):
                    if expected.margins[step] < NEAR_TIE_MARGIN:
                        ties += 1
                        break
                    if token != best:
                        wrong.append(f"attempt {attempt}, row {index}, token {step}")
                        break
    if worst > 5e-4:
        wrong.append(f"a log probability is off by {worst:.1e}")
    found = {"rows": 2 * len(rows), "near-ties": ties, "logprob error": worst}
    return found | ({"wrong": wrong} if wrong else {})


def task_model(task: dict[str, Any]) -> dict[str, Any]:
    """bfloat16 answers of a model, judged by the float32 reference.

    Rounding to 16 bits swaps tokens that are nearly as good. So what counts is by how much the
    reference prefers its own token to the engine's, and how base rows, which have no PEDRO in
    them, fare beside rows with an adapter.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from vllm import SamplingParams

    llm = start_llm(task, dtype="bfloat16")
    try:
        tokenizer = AutoTokenizer.from_pretrained(task["model"])
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=False
        )
    except (OSError, ValueError):  # a folder without a tokenizer, or one without a template
        vocabulary = llm.model_config.get_vocab_size()
        prompts = [[(53 * i + 17 * t * t) % vocabulary for t in range(24)] for i in range(4)]
    rows = [(list(p), a) for p in prompts for a in (None, *task["adapters"])]
    params = SamplingParams(temperature=0.0, max_tokens=32, detokenize=False)
    outputs = generate(llm, rows, params)
    llm.llm_engine.engine_core.shutdown()
    backbone = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    backbone.to(task["device"])
    found = []
    for adapter, model, members in with_adapters(backbone, rows):
        gaps = []
        for index in members:
            prompt, tokens = rows[index][0], list(outputs[index].outputs[0].token_ids)
            logits = reference_logits(model, [*prompt, *tokens], len(prompt))[len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
            gaps += (logits.max(-1).values - chosen).tolist()
        found.append(
            {
                "adapter": Path(adapter).name if adapter else "none",
                "tokens": len(gaps),
                "best": sum(gap == 0 for gap in gaps),
                "largest gap": max(gaps),
            }
        )
    limit = 0.25 + 2 * max(row["largest gap"] for row in found if row["adapter"] == "none")
    for row in found:
        if row["largest gap"] > limit:
            row["wrong"] = f"further off than base's rows let expect ({limit:.2f})"
    return {"rows": found}


# A server ----------------------------------------------------------------------------------------


def mixed_traffic(url: str, adapters: list[Path], seconds: float, clients: int) -> dict[str, Any]:
    """Requests to base and tenants `t0`, `t1`, ... while adapters are loaded, replaced and
    unloaded over HTTP. No request may fail.

    Args:
        url: The server's, without a path; it knows `base` and the tenants.
        adapters: Folders to load from; one for each tenant and more.
        clients: Requests at once.
    """
    end, lock = time.monotonic() + seconds, threading.Lock()
    passed: dict[str, list[float]] = {"base": [], "tenants": [], "operators": []}
    failed: list[str] = []
    tenants = [f"t{number}" for number in range(len(adapters) // 2)]

    def post(path: str, body: dict[str, Any], kind: str) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), headers)
        begin = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                text = answer.read().decode()
                problem = "" if answer.status == 200 else f"{answer.status}: {text}"
            if path == "completions" and not problem:
                made = json.loads(text)["usage"]["completion_tokens"]
                problem = "" if made == body["max_tokens"] else f"{made} tokens"
        except urllib.error.HTTPError as error:
            problem = f"{error.code}: {error.read().decode()}"
        except OSError as error:
            problem = str(error)
        with lock:
            passed[kind].append(time.perf_counter() - begin)
            if problem:
                failed.append(
                    f"{path}, {body.get('model', body.get('lora_name'))}: {problem}"[:300]
                )

    def complete(name: str, chance: random.Random) -> None:
        prompt = [chance.randrange(2, 500) for _ in range(chance.choice((8, 60, 300)))]
        body = {"model": name, "prompt": prompt, "max_tokens": chance.choice((4, 16, 48))}
        body |= {"temperature": 0.0, "ignore_eos": True}
        post("completions", body, "base" if name == "base" else "tenants")

    def client(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            complete(chance.choice(["base", *tenants]), chance)

    def operator() -> None:
        chance = random.Random(-1)
        while time.monotonic() < end:
            path = str(chance.choice(adapters))
            body = {"lora_name": chance.choice(tenants), "lora_path": path, "load_inplace": True}
            post("load_lora_adapter", body, "operators")
            post("load_lora_adapter", {"lora_name": "guest", "lora_path": path}, "operators")
            complete("guest", chance)
            post("unload_lora_adapter", {"lora_name": "guest"}, "operators")
            time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    threads.append(threading.Thread(target=operator))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found: dict[str, Any] = {"seconds": seconds, "clients": clients}
    for kind, times in passed.items():
        found[kind] = len(times)
        found[f"{kind}, median s"] = statistics.median(times) if times else None
    if failed:
        found["wrong"] = [f"{len(failed)} requests failed", *failed[:5]]
    elif not all(passed.values()):
        found["wrong"] = ["not every kind of request was made"]
    return found


def serve_part(
    shape: str, folder: Path, seconds: float, clients: int, deadline: float, on_cpu: bool
) -> dict[str, Any]:
    """A server as a user starts it, under mixed traffic.

    Args:
        shape: Of `MODELS`; dummy weights.
        folder: Where model, adapters and the server's log go.
        seconds: Of traffic.
        clients: Requests at once.
        deadline: Of `time.monotonic`; the server has to be there `seconds` before.
        on_cpu: Whether to keep the KV cache small and vLLM from compiling.
    """
    model, root = write_model(shape, folder / "model"), folder / "adapters"
    write_tokenizer(model, MODELS[shape]["vocab_size"])
    adapters = write_adapters(str(model), root, "pedro", 12)
    flags = ["--served-model-name", "base", "--load-format", "dummy", "--dtype", "bfloat16"]
    flags += ["--max-model-len", "1024", "--max-num-seqs", "64", "--enable-pedro"]
    flags += ["--pedro-root", str(root), "--pedro-modules"]
    flags += [f"t{number}={path}" for number, path in enumerate(adapters[:6])]
    if on_cpu:
        flags += ["--enforce-eager", "--kv-cache-memory-bytes", str(1 << 27)]
    allowed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    patience = deadline - time.monotonic() - seconds
    with serve(model, flags, folder / "server.txt", patience, **allowed) as server:
        found = mixed_traffic(server.url, adapters, seconds, clients)
        return {**found, "start s": server.seconds}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print("RESULT " + json.dumps(globals()["task_" + given["task"]](given)), flush=True)
