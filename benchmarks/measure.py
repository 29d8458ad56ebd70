"""Measurements that `vllm-pedro bench` does not make, each a case of its own.

    python benchmarks/measure.py change --before HEAD~1 --mode compiled
    python benchmarks/measure.py load
    python benchmarks/measure.py profile --mode compiled --rows 8

What is compared takes turns, in reverse order every other time; ratios are taken within a repeat.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np

from vllm_pedro.bench.adapters import MODULES, PEDRO_RANK, store_columns, write_adapters
from vllm_pedro.bench.cases import engine_options, shared_device
from vllm_pedro.bench.engines import EngineProcess
from vllm_pedro.bench.figures import Spread, measure
from vllm_pedro.bench.servers import serve
from vllm_pedro.bench.serving import BASE_NAME, run_client
from vllm_pedro.bench.tables import table
from vllm_pedro.bench.workloads import Request, Workload, fixed_lengths
from vllm_pedro.demo import ADAPTERS
from vllm_pedro.fetch import fetch_model

ROOT = Path(__file__).resolve().parents[1]
Measures = dict[str, float]
Found = dict[str, list[Measures]]
"""Of each that is compared, what was measured in each repeat."""


def in_turns(
    ask: Mapping[str, Callable[[], Measures]], repeats: int, warm_up: bool = True
) -> Found:
    """Measure each, in each repeat; with a repeat before them that does not count."""
    found: Found = {name: [] for name in ask}
    for repeat in range(-warm_up, repeats):
        for name in ask if repeat % 2 == 0 else reversed(ask):
            measures = ask[name]()
            if repeat >= 0:
                found[name].append(measures)
                print(name, {k: round(v, 3) for k, v in measures.items()}, file=sys.stderr)
    return found


def show(found: Found, pairs: Sequence[tuple[str, str]] = (), digits: int = 2) -> None:
    """Print medians (lowest-highest), and of pairs the first over the second."""
    measures = list(next(iter(found.values()))[0])

    def line(label: str, runs: Sequence[Measures], digits: int) -> list[str]:
        spreads = (Spread.of(run[m] for run in runs) for m in measures)
        return [label, *(s.format(0 if s.median >= 1000 else digits) for s in spreads)]

    rows = [line(name, runs, digits) for name, runs in found.items()]
    for mine, other in pairs:
        both = zip(found[mine], found[other], strict=True)
        ratios = [{m: a[m] / b[m] for m in measures} for a, b in both]
        rows.append(line(f"{mine} / {other}", ratios, 3))
    print(table(("", *measures), rows))


@contextlib.contextmanager
def sources(revision: str | None = None) -> Iterator[Path]:
    """A copy of this tree's package, so that it may be edited while this runs; or a revision with
    its native library, copied or built."""
    with tempfile.TemporaryDirectory(prefix="vllm-pedro-sources-") as folder:
        tree = Path(folder)
        if revision is None:
            shutil.copytree(ROOT / "vllm_pedro", tree / "vllm_pedro")
        else:
            git = ["git", "-C", str(ROOT)]
            files = subprocess.run([*git, "archive", revision], check=True, stdout=subprocess.PIPE)
            subprocess.run(["tar", "-x", "-C", folder], input=files.stdout, check=True)
            same = [*git, "diff", "--quiet", revision, "--", "csrc", "setup.py"]
            library = ROOT / "vllm_pedro" / "_C.so"
            if library.exists() and subprocess.run(same, check=False).returncode == 0:
                shutil.copy(library, tree / "vllm_pedro")
            else:
                build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                subprocess.run(build, cwd=tree, check=True)
        yield tree


@contextlib.contextmanager
def engines(
    args: argparse.Namespace, folder: Path, trees: Mapping[str, Path]
) -> Iterator[dict[str, EngineProcess]]:
    """Engines in processes of their own: `base` without PEDRO, others with it.

    Args:
        trees: Of each engine, where its sources are.
    """
    settings = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": args.prompt_tokens + args.output_tokens + 8,
        "max_num_seqs": args.rows,
        "max_num_batched_tokens": max(2048, args.rows * args.prompt_tokens),
        "kv_cache_memory_bytes": 1 << 29,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        **shared_device(),
    }
    with contextlib.ExitStack() as stack:
        found = {}
        for name, tree in trees.items():
            engine = f"{'base' if name == 'base' else 'pedro'}-{args.mode}"
            keywords = settings | engine_options(engine, args.rows, args.llm)
            sys.path.insert(0, str(tree))  # a spawned process gets a copy of it
            found[name] = EngineProcess(engine, keywords, folder / f"{name}.log")
            sys.path.pop(0)
            stack.callback(found[name].close)
            found[name].wait()
        yield found


# One change, before and after --------------------------------------------------------------------


def change(args: argparse.Namespace, folder: Path) -> None:
    """PEDRO as it was and as it is, beside base: times of tokens.

    The revision before has to start engines as this one does.
    """
    workload = fixed_lengths(args.rows, args.prompt_tokens, args.output_tokens)
    tenants = workload.with_tenants(range(args.rows))
    paths = write_adapters(args.model, folder / "adapters", "pedro", args.rows)
    with contextlib.ExitStack() as stack:
        now = stack.enter_context(sources())
        trees = {"base": now, "before": stack.enter_context(sources(args.before)), "after": now}
        found = stack.enter_context(engines(args, folder, trees))
        tasks: dict[str, tuple[Any, ...]] = dict.fromkeys(found, (workload,))
        for name in ("before", "after"):
            tasks[f"{name}, {args.rows} tenants"] = tenants, paths

        def ask(name: str) -> Measures:
            figures = measure(found[name.partition(",")[0]].run(*tasks[name]))
            return {"token, ms": figures["itl_mean_ms"], "first, ms": figures["ttft_mean_ms"]}

        result = in_turns({name: lambda n=name: ask(n) for name in tasks}, args.repeats)
    pairs = [("base", name) for name in tasks if name != "base"]
    pairs += [(name, name.replace("before", "after")) for name in tasks if "before" in name]
    show(result, pairs)


# A tenant's first request ------------------------------------------------------------------------

ADAPTERS_LOADED, WARM_UP, HOST_SLOTS = 144, 48, 32


def load(args: argparse.Namespace, folder: Path) -> None:
    """What a tenant's first request costs for its adapter, part by part, in ms of CPU time.

    Front end: the folder is found, read and checked. Host: the worker reads it and packs it in host
    memory. Device: it is copied from there, which an engine on the CPU does not do. Log lines are
    written as an engine writes them. Medians over the adapters. The revision before has to have
    what this script imports.
    """
    if args.folders:
        print(json.dumps(load_once(args.model, sorted(args.folders.resolve().iterdir()))))
        return
    write_adapters(args.model, folder / "adapters", "pedro", ADAPTERS_LOADED)
    command = [sys.executable, __file__, "load", "--model", args.model]
    command += ["--folders", str(folder / "adapters")]
    with contextlib.ExitStack() as stack:
        trees = {"now": stack.enter_context(sources())}
        if args.before:
            trees["before"] = stack.enter_context(sources(args.before))

        def ask(tree: Path) -> Measures:
            # What it logs goes nowhere, but is made.
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            environment = os.environ | {"PYTHONPATH": str(tree), "VLLM_LOGGING_LEVEL": "INFO"}
            done = subprocess.run(command, env=environment, check=True, **pipes)
            return json.loads(done.stdout.splitlines()[-1])

        asks = {name: lambda t=tree: ask(t) for name, tree in trees.items()}
        show(in_turns(asks, args.repeats, warm_up=False))


def load_once(model: str, paths: list[Path]) -> Measures:
    """Load all adapters in this process; medians of those after the warm-up."""
    import vllm.logger  # noqa: F401

    from vllm_pedro.backbone import BackboneShape
    from vllm_pedro.integration import plugin
    from vllm_pedro.integration.frontend.registry import AdapterRegistry
    from vllm_pedro.serving.adapters import AdapterBank, AdapterLimits, AdapterReader, HostCache
    from vllm_pedro.serving.spec import RequestSpec

    import torch  # isort: skip

    plugin.register()  # shows this package's log lines as vLLM's
    torch.set_num_threads(1)
    shape = BackboneShape.from_pretrained(model)
    limits = AdapterLimits(shape, PEDRO_RANK, MODULES)
    registry = AdapterRegistry(limits)
    reader = AdapterReader(limits, store_columns(shape, MODULES))
    host = HostCache(HOST_SLOTS, reader)
    bank = AdapterBank(8 * limits.largest_blob, reader, torch.device("cpu"), host)
    found: dict[str, list[float]] = {"front end": [], "host": [], "device": []}

    def timed(part: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.process_time()
        result = call(*arguments)
        found[part].append(1e3 * (time.process_time() - start))
        return result

    specs = []
    for path in paths:
        known = timed("front end", registry.lookup, str(path))
        specs.append(RequestSpec(path.name, str(path), known.digest, 16, "prompt"))
    for spec in specs:
        timed("host", host.get, spec)
        timed("device", bank.make_resident, spec, {spec.digest})
    found["all"] = [sum(times) for times in zip(*found.values(), strict=True)]
    return {part: statistics.median(times[WARM_UP:]) for part, times in found.items()}


# Who waits for whom ------------------------------------------------------------------------------

LONG, SHORT, ANSWER, QUEUE_TENANTS = 1016, 32, 8, 4


def queue(args: argparse.Namespace, folder: Path) -> None:
    """First tokens, in ms, of the backbone's requests beside prompts of greatest length.

    Two servers, each with its own default budget: PEDRO, whose long prompts ask for adapters and
    have to fit one step, and vLLM without it, which takes the same prompts in chunks.
    """
    draw, now, requests = random.Random(0), 0.0, []
    while now < args.seconds:  # short prompts at random times; each `every`-th is long, a tenant's
        group, place = divmod(len(requests), args.every)
        is_long = place == args.every - 1
        tenant = group % QUEUE_TENANTS if is_long else None
        requests.append(Request(LONG if is_long else SHORT, ANSWER, tenant, now))
        now += draw.expovariate(args.rate)
    workload = Workload("queue", tuple(requests), "")
    paths = write_adapters(args.model, folder / "adapters", "pedro", QUEUE_TENANTS)
    flags = ["--served-model-name", BASE_NAME, "--enforce-eager", "--no-enable-prefix-caching"]
    flags += ["--max-model-len", str(LONG + ANSWER), "--kv-cache-memory-bytes", str(1 << 29)]
    pedro = ["--enable-pedro", "--pedro-modules", *(f"{p.name}={p}" for p in paths)]

    def ask(asked: Workload, adapters: list[Path], more: list[str]) -> Measures:
        with serve(args.model, [*flags, *more], folder / "log", shares_cores=False) as server:
            first = asked.requests[args.every - 1 :: args.every][:QUEUE_TENANTS]
            for each in (replace(asked, requests=first, concurrency=1), asked):
                timings = run_client(each, args.model, server, adapters, folder)
        pairs = list(zip((1e3 * t.ttft for t in timings), requests, strict=True))
        short = [ttft for ttft, request in pairs if request.tenant is None]
        return {
            "short, median": float(np.median(short)),
            "short, p99": float(np.percentile(short, 99)),
            "long, median": statistics.median(t for t, r in pairs if r.tenant is not None),
        }

    plain = workload.with_tenants([None] * len(requests))
    asks = {"PEDRO": lambda: ask(workload, paths, pedro), "vLLM": lambda: ask(plain, [], [])}
    show(in_turns(asks, args.repeats, warm_up=False), [("PEDRO", "vLLM")], 0)


# Prompts computed again --------------------------------------------------------------------------

CONVERSATIONS, TURNS = 8, 4
DOCUMENT_TOKENS, QUESTION_TOKENS = 2000, 20
SYSTEM_TOKENS, USER_TOKENS, ANSWER_TOKENS = 256, 40, 60


def recompute(args: argparse.Namespace, folder: Path) -> None:
    """What whole prompts and exact cache keys cost: prompt tokens computed that base would not.

    Conversations of several turns share a system prompt; each turn sends the whole conversation so
    far, as chat clients do. With `--document`, tenants ask about one long text, each its own
    question, beside LoRA. Counted is what vLLM reports as cached for each request.
    """
    if args.document:
        share_document(args, folder)
        return
    from vllm_pedro.integration.llm import start_llm

    sequence = ADAPTERS / "brief"
    adapters = {"sequence": sequence, "answer": with_scope(sequence, folder / "answer", "answer")}
    rows: dict[str, tuple[Path | None, bool]] = {"base rows": (None, False)}
    for scope, adapter in adapters.items():
        rows[f'scope "{scope}", P = the whole prompt of each turn'] = adapter, False
        rows[f'scope "{scope}", P = the first turn\'s prompt'] = adapter, True
    settings = {
        "block_size": 32,
        "max_model_len": SYSTEM_TOKENS + TURNS * (USER_TOKENS + ANSWER_TOKENS),
        "max_num_seqs": 2 * CONVERSATIONS,
        "kv_cache_memory_bytes": 1 << 30,
    }
    lines, base = [], 0
    with start_llm(args.model, [str(sequence)], **settings) as llm:
        for name, case in rows.items():
            total, computed = converse(llm, *case)
            base = base or computed
            lines.append([name, str(total), str(computed), f"{(computed - base) / total:.1%}"])
    print(table(("", "prompt tokens", "computed", "recomputed"), lines))


def converse(llm: Any, adapter: Path | None, ends: bool) -> tuple[int, int]:
    """Hold all conversations, turn by turn; prompt tokens, and those that were computed."""
    from vllm import SamplingParams

    from vllm_pedro import PedroRequest

    llm.reset_prefix_cache()
    draw = random.Random(0)
    vocabulary = range(llm.llm_engine.model_config.get_vocab_size())
    system = draw.choices(vocabulary, k=SYSTEM_TOKENS)
    texts = [system[:] for _ in range(CONVERSATIONS)]
    first = SYSTEM_TOKENS + USER_TOKENS if ends else None
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    total = cached = 0
    for _ in range(TURNS):
        for text in texts:
            text += draw.choices(vocabulary, k=USER_TOKENS)
        tenant = adapter and PedroRequest("a", 1, str(adapter), prompt_length=first)
        prompts = [{"prompt_token_ids": list(text)} for text in texts]
        outputs = llm.generate(prompts, params, lora_request=tenant, use_tqdm=False)
        for text, output in zip(texts, outputs, strict=True):
            total += len(output.prompt_token_ids)
            cached += output.num_cached_tokens or 0
            text += output.outputs[0].token_ids
    return total, total - cached


def share_document(args: argparse.Namespace, folder: Path) -> None:
    """Tenants ask about one document, one after another; timed is each one's first token."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from vllm_pedro import PedroRequest
    from vllm_pedro.integration.llm import start_llm

    count, params = args.tenants, SamplingParams(temperature=0.0, max_tokens=1)
    pedro, lora = (
        write_adapters(args.model, folder / kind, kind, count) for kind in ("pedro", "lora")
    )
    answers = [with_scope(path, folder / "answer" / path.name, "answer") for path in pedro]
    settings = {"max_model_len": 2048, "max_num_seqs": 4, "kv_cache_memory_bytes": 1 << 30}
    ours = {"base rows": [None] * count, 'scope "answer"': answers, 'scope "sequence"': pedro}
    loras = {"enable_lora": True, "max_loras": 1, "max_cpu_loras": count, "max_lora_rank": 16}
    engines: tuple[tuple[dict[str, Any], Any, dict[str, Any]], ...] = (
        (ours, PedroRequest, {"adapters": [str(path) for path in pedro]}),
        ({"LoRA": lora}, LoRARequest, loras),
    )
    lines = []
    for cases, kind, keywords in engines:
        with start_llm(args.model, **keywords, **settings) as llm:
            vocabulary = range(llm.llm_engine.model_config.get_vocab_size())
            for name, tenants in cases.items():
                llm.reset_prefix_cache()
                draw = random.Random(0)
                document = draw.choices(vocabulary, k=DOCUMENT_TOKENS)
                total = cached = 0
                seconds = []
                for i, path in enumerate(tenants):
                    tenant = path and kind(path.name, i + 1, str(path))
                    prompt = document + draw.choices(vocabulary, k=QUESTION_TOKENS)
                    given: Any = {"prompt_token_ids": prompt}
                    start = time.perf_counter()
                    (output,) = llm.generate(given, params, lora_request=tenant, use_tqdm=False)
                    seconds.append(time.perf_counter() - start)
                    total += len(prompt)
                    cached += output.num_cached_tokens or 0
                first = Spread.of(seconds[1:]).format(2)
                lines.append([name, str(total), str(total - cached), first])
    print(table(("", "prompt tokens", "computed", "first token, s, from the 2nd on"), lines))


def with_scope(adapter: Path, copy: Path, scope: str) -> Path:
    """A copy of an adapter with another scope."""
    shutil.copytree(adapter, copy)
    config = copy / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "scope": scope}))
    return copy


# Training ----------------------------------------------------------------------------------------


def training(args: argparse.Namespace, folder: Path) -> None:
    """A training step of PEDRO and of PEFT's LoRA with as many parameters, on random tokens.

    Both train on one backbone; modules are attached for a turn and taken off again. Kept is what
    autograd holds between forward and backward, parameters left out.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from vllm_pedro import PedroConfig, get_pedro_model
    from vllm_pedro.training.run import load_backbone

    device = "cuda" if torch.cuda.is_available() else "cpu"
    backbone, _ = load_backbone(args.model, getattr(torch, args.dtype))
    backbone.to(device)
    backbone.config.use_cache = False
    draw = torch.Generator().manual_seed(0)
    size = args.rows, args.tokens
    ids = torch.randint(3, backbone.config.vocab_size, size, generator=draw).to(device)
    labels = ids.clone()
    labels[:, : args.tokens - max(1, args.tokens // 8)] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def pedro() -> Any:
        return get_pedro_model(backbone, PedroConfig(r=args.pedro_r, input_norm="rms"))

    model = pedro()
    budget, _ = model.get_nb_trainable_parameters()
    each = sum(width + model.shape.hidden_size for width in model.shape.split_widths(MODULES))
    rank = max(1, round(budget / (each * model.shape.num_layers)))
    model.unload()

    def lora() -> Any:
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(MODULES), task_type="CAUSAL_LM"
        )
        return get_peft_model(backbone, settings)

    def ask(make: Callable[[], Any]) -> Measures:
        torch.manual_seed(0)
        model = make().train()
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4)
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        def step() -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step()  # the optimizer's state, LoRA's first allocation
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        step()
        found = {"step, s": time.perf_counter() - began, "kept, MiB": sum(kept.values()) / 2**20}
        if device == "cuda":
            found["peak, MiB"] = torch.cuda.max_memory_allocated() / 2**20
        model.unload()
        return found | {"parameters": sum(p.numel() for p in trainable)}

    result = in_turns({"PEDRO": lambda: ask(pedro), "LoRA": lambda: ask(lora)}, args.repeats)
    show(result, [("PEDRO", "LoRA")])


# Where a decode step's time goes -----------------------------------------------------------------

STEPS = 50


def profile(args: argparse.Namespace, folder: Path) -> None:
    """Where a decode step's time goes: base beside PEDRO, by torch's profiler.

    Shown are the operators (on a GPU the kernels) whose own time differs most per step, and what is
    outside of them: Python. Profiling costs time, too; trust shares more than sums.
    """
    args.output_tokens = 2 * STEPS
    workload = fixed_lengths(args.rows, args.prompt_tokens, args.output_tokens)
    workload = workload.with_tenants(range(args.rows))
    paths = write_adapters(args.model, folder / "adapters", "pedro", args.rows)
    own: dict[str, Counter[str]] = {"base": Counter(), "PEDRO": Counter()}
    calls: dict[str, Counter[str]] = {"base": Counter(), "PEDRO": Counter()}
    with engines(args, folder, dict.fromkeys(own, ROOT)) as found:
        tasks = {
            "base": (workload.with_tenants([None] * args.rows), []),
            "PEDRO": (workload, paths),
        }

        def ask(name: str) -> Measures:
            figures = measure(found[name].run(*tasks[name]))
            for operator, (us, count) in found[name].profile(*tasks[name], STEPS).items():
                own[name][operator] += us / STEPS / (args.repeats + 1)
                calls[name][operator] += count
            return {"step without the profiler, ms": figures["itl_median_ms"]}

        asks = {name: lambda n=name: ask(n) for name in tasks}
        show(in_turns(asks, args.repeats), [("base", "PEDRO")])
    base, pedro = own.values()
    order = sorted(base | pedro, key=lambda key: -abs(pedro[key] - base[key]))[: args.top]
    rows = [
        (
            key[:60] or "(outside)",
            "/".join(f"{n[key] / STEPS / (args.repeats + 1):.0f}" for n in calls.values()),
            *(f"{us:.0f}" for us in (base[key], pedro[key])),
            f"{pedro[key] - base[key]:+.0f}",
            f"{100 * (pedro[key] - base[key]) / base.total():+.1f} %",
        )
        for key in order
    ]
    headers = ("operator, own time", "calls per step", "base, µs", "PEDRO, µs", "difference")
    print(table((*headers, "of base's step"), rows))


# Is what is served what was trained? -------------------------------------------------------------


def served(args: argparse.Namespace, folder: Path) -> int:
    """Greedy answers, float32, by transformers and by vLLM.

    Where answers differ and the reference's two best logits are closer than 1e-3 at the first token
    that differs, the choice hangs on rounding and is counted as a near-tie, otherwise as a
    difference. `--scores` adds a task's score by both engines, in `--scores-dtype`.
    """
    import torch

    from vllm_pedro.integration.evaluate import start_engine
    from vllm_pedro.model import PedroModel
    from vllm_pedro.model.reference import NEAR_TIE_MARGIN, reference_score
    from vllm_pedro.training.data import encode, prompt_tokens, read_rows
    from vllm_pedro.training.evaluate import TransformersEngine, evaluate
    from vllm_pedro.training.run import load_backbone, pad_token_id

    rows = read_rows(args.data, args.limit)
    backbone, tokenizer = load_backbone(args.model, torch.float32)
    model = PedroModel.from_pretrained(backbone, args.adapter)
    prompts = [prompt_tokens(tokenizer, row) for row in rows]
    asked = prompts, [len(prompt) for prompt in prompts], args.max_new_tokens
    local = TransformersEngine(model, pad_token_id(tokenizer)).generate(*asked)
    room = max(len(encode(tokenizer, row)) for row in rows) + args.max_new_tokens + 1
    with start_engine(args.model, args.adapter, room, "float32") as engine:
        answers = engine.generate(*asked)
    found = Counter(equal=0, near_ties=0, different=0)
    for prompt, one, other in zip(prompts, local, answers, strict=True):
        if one == other:
            found["equal"] += 1
            continue
        whole = [*one, tokenizer.eos_token_id]
        pairs = zip(whole, [*other, tokenizer.eos_token_id], strict=False)
        place = next(i for i, (a, b) in enumerate(pairs) if a != b)
        margin = reference_score(model, prompt, whole[: place + 1]).margins[place]
        found["near_ties" if margin < NEAR_TIE_MARGIN else "different"] += 1
    result: dict[str, Any] = {"prompts": len(prompts), "tokens": sum(map(len, answers)), **found}
    if args.scores:
        model.unload()
        model = PedroModel.from_pretrained(
            backbone.to(getattr(torch, args.scores_dtype)), args.adapter
        )
        here = TransformersEngine(model, pad_token_id(tokenizer))
        score = args.scores, args.max_new_tokens
        result["transformers"] = evaluate(here, tokenizer, rows, *score)
        with start_engine(args.model, args.adapter, room, args.scores_dtype) as engine:
            result["vllm"] = evaluate(engine, tokenizer, rows, *score)
    print(json.dumps(result))
    return 1 if found["different"] else 0


def rounding(args: argparse.Namespace, folder: Path) -> int:
    """What it costs that engines keep vectors in the model's dtype.

    The loss of completions by the float32 reference with its vectors as they are, rounded to
    bfloat16, and with their distances from one rounded. Higher layers see what that does.
    """
    import torch

    from vllm_pedro.model import PedroModel
    from vllm_pedro.training.data import read_rows
    from vllm_pedro.training.evaluate import TransformersEngine, evaluate
    from vllm_pedro.training.run import load_backbone, pad_token_id

    rows = read_rows(args.data, args.limit)
    backbone, tokenizer = load_backbone(args.model, torch.float32)
    model = PedroModel.from_pretrained(backbone, args.adapter)
    engine = TransformersEngine(model, pad_token_id(tokenizer))
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "float32": lambda vector: vector,
        "bfloat16": lambda vector: vector.bfloat16().float(),
        "bfloat16, of l - 1": lambda vector: (vector - 1).bfloat16().float() + 1,
    }
    losses = {}
    for name, way in ways.items():
        with contextlib.ExitStack() as stack:
            for generator in model.vector_generators[model.active_adapter]:
                handle = generator.register_forward_hook(
                    lambda module, inputs, output, way=way: {k: way(v) for k, v in output.items()}
                )
                stack.callback(handle.remove)
            losses[name] = evaluate(engine, tokenizer, rows, "loss")["loss"]
    print(json.dumps({"rows": len(rows), "loss": losses}))
    return 0


# The command line --------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Of all cases."""
    from vllm_pedro.training.evaluate import METRICS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    cases = parser.add_subparsers(dest="case", metavar="CASE", required=True)

    def case(run: Callable[..., Any], numbers: dict[str, Any]) -> argparse.ArgumentParser:
        """A case and its options with a default."""
        own = cases.add_parser(
            run.__name__,
            help=run.__doc__.partition("\n")[0],
            description=run.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(run=run)
        own.add_argument("--model", metavar="FOLDER", help="default: the demo's, fetched")
        for option, default in numbers.items():
            about: Any = {"type": type(default), "default": default, "help": "(%(default)s)"}
            own.add_argument(option, metavar="X", **about)
        return own

    def engine_case(run: Callable[..., Any], numbers: dict[str, Any]) -> argparse.ArgumentParser:
        shared = {"--rows": 16, "--repeats": 7, "--dtype": "bfloat16"}
        own = case(run, shared | numbers)
        own.add_argument("--mode", choices=["eager", "compiled"], default="compiled")
        what = "further keywords of `LLM`"
        own.add_argument("--llm", type=json.loads, default={}, metavar="JSON", help=what)
        return own

    own = engine_case(change, {"--prompt-tokens": 64, "--output-tokens": 48})
    own.add_argument("--before", default="HEAD", metavar="REVISION", help="(%(default)s)")
    engine_case(profile, {"--prompt-tokens": 128, "--top": 14})
    own = case(load, {"--repeats": 3})
    own.add_argument("--before", metavar="REVISION", help="measure this one, too")
    own.add_argument("--folders", type=Path, help=argparse.SUPPRESS)  # of a process it starts
    case(queue, {"--seconds": 90.0, "--rate": 2.0, "--every": 20, "--repeats": 3})
    own = case(recompute, {"--tenants": 50})
    own.add_argument("--document", action="store_true", help="of 2,000 tokens")
    sizes = {"--rows": 8, "--tokens": 64, "--repeats": 5, "--pedro-r": 12, "--dtype": "float32"}
    case(training, sizes)
    one = case(served, {"--limit": 100, "--max-new-tokens": 32, "--scores-dtype": "bfloat16"})
    one.add_argument("--scores", choices=METRICS)
    for own in (one, case(rounding, {"--limit": 100})):
        own.add_argument("--adapter", required=True, metavar="FOLDER")
        own.add_argument("--data", required=True, metavar="FILE")
    return parser


def main() -> int:
    args = make_parser().parse_args()
    # Ends through the blocks that end servers and engines.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    args.model = args.model or str(fetch_model(progress=False))
    with tempfile.TemporaryDirectory(prefix="vllm-pedro-") as folder:
        return args.run(args, Path(folder)) or 0


if __name__ == "__main__":
    sys.exit(main())
