"""What `gpu_check.py` runs beside its timed engines: exactness, a model's answers, a server."""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from gpu_engine import Script
from gpu_operators import MODELS

from vllm_pedro import BackboneShape, PedroConfig, PedroModel, PedroRequest
from vllm_pedro.bench.adapters import MODULES, write_adapters, write_pedro
from vllm_pedro.bench.servers import serve
from vllm_pedro.demo import QUESTIONS
from vllm_pedro.integration.llm import start_llm
from vllm_pedro.model.reference import reference_logits

FUZZER = Path(__file__).resolve().parent.parent / "stress" / "schedule_fuzz.py"
Rows = Iterator[dict[str, Any]]


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
    torch.manual_seed(0)
    (LlamaForCausalLM(config) if weights else config).save_pretrained(folder)
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
    paths = [folder / f"strong-{number}" for number in range(count)]
    return [write_pedro(path, shape, config, seed, scale) for seed, path in enumerate(paths, 1)]


def rows_of(command: list[str], deadline: float, **environment: str) -> Rows:
    """What a script prints, and why it failed, if it did; it ends at `deadline`."""
    with tempfile.TemporaryDirectory() as folder:
        script = Script(command, Path(folder, "log.txt"), environment)
        try:
            yield from script.rows(deadline)
        except (RuntimeError, TimeoutError) as error:
            yield {"error": str(error)}
        finally:
            script.close()


def run_task(task: str, arguments: dict[str, Any], deadline: float, **environment: str) -> Rows:
    """Run a task of this file in a process of its own."""
    yield from rows_of([__file__, task, json.dumps(arguments)], deadline, **environment)


def fuzz(seconds: float, flags: list[str], deadline: float) -> Rows:
    """A sample of the schedule fuzzer."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [str(FUZZER), "--seed", "11", "--cases", "100000", "--json", str(report)]
        command += ["--minutes", str(seconds / 60), *flags]
        errors = list(rows_of(command, deadline, TRITON_F32_DEFAULT="ieee"))
        found = json.loads(report.read_text()) if report.is_file() else {}
    if found.get("failures"):
        yield {"cases": found["cases"], "wrong": [str(f)[:400] for f in found["failures"][:5]]}
    elif errors or not found:
        yield from errors or [{"error": "no report"}]
    else:
        yield {"cases": found["cases"]}


# Tasks -------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}},
    "graphs": {"enforce_eager": False},
}


def generate(
    model: str, mode: str, rows: list[tuple[list[int], str | None]], *calls: Any, **settings: Any
) -> list[list[Any]]:
    """Greedy answers of a small engine in this process, one batch a call.

    Args:
        rows: Prompts, and their adapters' folders.
        calls: Of `SamplingParams`, what differs from a greedy one's.
    """
    from vllm import SamplingParams

    if torch.cuda.is_available():  # others are on the card too
        settings |= {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.02}
    else:
        settings |= {"kv_cache_memory_bytes": 1 << 27, "distributed_executor_backend": "uni"}
    settings |= {"max_model_len": 512, "max_num_seqs": 16, "skip_tokenizer_init": True}
    numbers = {path: number for number, path in enumerate(sorted({p for _, p in rows if p}), 1)}
    with start_llm(model, enable_pedro=True, **MODES[mode], **settings) as llm:
        return [
            llm.generate(
                [{"prompt_token_ids": prompt} for prompt, _ in rows],
                SamplingParams(temperature=0.0, detokenize=False, **call),
                lora_request=[p and PedroRequest(Path(p).name, numbers[p], p) for _, p in rows],
                use_tqdm=False,
            )
            for call in calls
        ]


def exact(model: str, adapters: list[str], mode: str, prefix: bool) -> Rows:
    """Greedy tokens and prompt log probabilities of a mixed batch, against the reference."""
    names: list[str | None] = [None, *adapters]
    # One-token prompts and repeated ones: they look like decodes to a graph.
    lengths = [1, 7, 33, 64, 1, 17, 40, 5]
    vocabulary = MODELS["small"]["vocab_size"]
    prompts = [
        [(53 * i + 17 * t * t + t) % vocabulary for t in range(n)] for i, n in enumerate(lengths)
    ]
    rows = [(p, names[i % len(names)]) for i, p in enumerate(prompts)]
    rows += [(prompts[3], names[1]), (prompts[0], names[1]), (prompts[1], None)]
    calls = [{"max_tokens": 12, "ignore_eos": True, "prompt_logprobs": 0} for _ in range(2)]
    if prefix:  # the second one finds cached prompts
        calls[1]["prompt_logprobs"] = None
    settings = {"dtype": "float32", "max_pedros": 4, "enable_prefix_caching": prefix}
    attempts = generate(model, mode, rows, *calls, **settings)
    sys.path.insert(0, str(FUZZER.parent))
    import schedule_fuzz

    judge = schedule_fuzz.Judge(Path(model), {path: Path(path) for path in adapters})
    report, wrong = schedule_fuzz.Report(), []
    for attempt, outputs in enumerate(attempts):
        for index, ((prompt, adapter), output) in enumerate(zip(rows, outputs, strict=True)):
            draw = schedule_fuzz.Draw(adapter, prompt, max_tokens=12)
            active = schedule_fuzz.Active(draw, prompt, len(prompt), 0)
            active.completions[0] = output.outputs[0]
            active.prompt_logprobs = output.prompt_logprobs
            try:
                judge.check(active, 0, 512, report)
            except schedule_fuzz.Mismatch as error:
                wrong.append(f"attempt {attempt}, row {index}: {error}")
    found = {"rows": 2 * len(rows), "near-ties": report.near_ties}
    found["logprob error"] = report.worst_logprob_error
    yield found | ({"wrong": wrong} if wrong else {})


def judged(model: str, adapters: list[str], mode: str) -> Rows:
    """bfloat16 answers of a model, judged by the float32 reference.

    Rounding to 16 bits swaps tokens that are nearly as good. So what counts is by how much the
    reference prefers its own token to the engine's, and how base rows, which have no PEDRO in
    them, fare beside rows with an adapter.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=False
        )
    except (OSError, ValueError):  # a folder without a tokenizer, or one without a template
        prompts = [[(53 * i + 17 * t * t) % 500 for t in range(24)] for i in range(4)]
    rows = [(list(prompt), name) for name in (None, *adapters) for prompt in prompts]
    (outputs,) = generate(model, mode, rows, {"max_tokens": 32}, dtype="bfloat16")
    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    backbone.to("cuda" if torch.cuda.is_available() else "cpu")
    limit = 0.0
    for name in (None, *adapters):
        scorer = PedroModel.from_pretrained(backbone, name) if name else backbone
        gaps: list[float] = []
        for (prompt, adapter), output in zip(rows, outputs, strict=True):
            if adapter != name:
                continue
            tokens = list(output.outputs[0].token_ids)
            logits = reference_logits(scorer, [*prompt, *tokens], len(prompt))[len(prompt) - 1 : -1]
            chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
            gaps += (logits.max(-1).values - chosen).tolist()
        if name:
            scorer.unload()
        else:
            limit = 0.25 + 2 * max(gaps)
        row: dict[str, Any] = {"adapter": Path(name).name if name else "none", "tokens": len(gaps)}
        row |= {"best": sum(gap == 0 for gap in gaps), "largest gap": max(gaps)}
        if max(gaps) > limit:
            row["wrong"] = f"further off than base's rows let expect ({limit:.2f})"
        yield row


# A server ----------------------------------------------------------------------------------------


def mixed_traffic(url: str, adapters: list[Path], seconds: float, clients: int) -> dict[str, Any]:
    """Requests to base and tenants `t0`, `t1`, ... while adapters are loaded, replaced and
    unloaded over HTTP. No request may fail.

    Args:
        url: The server's, without a path; it knows `base` and the tenants.
        adapters: Folders to load from; two for each tenant.
        clients: Requests at once, beside an operator's.
    """
    end = time.monotonic() + seconds
    passed: dict[str, list[float]] = {"base": [], "tenants": [], "operators": []}
    failed: list[str] = []
    tenants = [f"t{number}" for number in range(len(adapters) // 2)]
    # A connection for each request: one that waits may be closed as it is used again.
    once = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    client = httpx.Client(base_url=f"{url}/v1/", timeout=120, limits=once)

    def post(kind: str, path: str, **body: Any) -> None:
        begin = time.perf_counter()
        try:
            answer = client.post(path, json=body)
            problem = "" if answer.status_code == 200 else f"{answer.status_code}: {answer.text}"
            if path == "completions" and not problem:
                made = answer.json()["usage"]["completion_tokens"]
                problem = "" if made == body["max_tokens"] else f"{made} tokens"
        except httpx.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        passed[kind].append(time.perf_counter() - begin)
        if problem:
            name = body.get("model", body.get("lora_name"))
            failed.append(f"{path}, {name}: {problem}"[:300])

    def complete(name: str, chance: random.Random) -> None:
        prompt = [chance.randrange(2, 500) for _ in range(chance.choice((8, 60, 300)))]
        kind, tokens = "base" if name == "base" else "tenants", chance.choice((4, 16, 48))
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
        post(kind, "completions", model=name, **body)

    def work(number: int) -> None:
        """A client's, or as number 0 an operator's."""
        chance = random.Random(number)
        while time.monotonic() < end:
            if number:
                complete(chance.choice(["base", *tenants]), chance)
                continue
            load, path = ("operators", "load_lora_adapter"), str(chance.choice(adapters))
            post(*load, lora_name=chance.choice(tenants), lora_path=path, load_inplace=True)
            post(*load, lora_name="guest", lora_path=path)
            complete("guest", chance)
            post("operators", "unload_lora_adapter", lora_name="guest")
            time.sleep(0.2)

    with ThreadPoolExecutor(clients + 1) as jobs:
        list(jobs.map(work, range(clients + 1)))
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
    """A server as a user starts it, with dummy weights, under mixed traffic.

    Args:
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
    for found in {"exact": exact, "judged": judged}[sys.argv[1]](**json.loads(sys.argv[2])):
        print("RESULT " + json.dumps(found), flush=True)
