"""Where a decode step's time goes: base beside PEDRO, operator by operator, by torch's profiler.

    python benchmarks/profile_step.py --mode compiled

Both engines live in this process and take turns, some steps each at a time, so that a machine whose
speed drifts hurts them alike. Shown are the operators whose own time differs most per step, and
what is outside of torch's operators (Python: scheduler, input preparation, output processing).
Profiling itself costs time, most of it for small operators; trust shares more than sums.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm_pedro.bench.adapters import MODULES, write_adapters
from vllm_pedro.bench.figures import Spread
from vllm_pedro.bench.workloads import fixed_lengths


def prompts_of(batch: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Token-id prompts that differ from their first token on, so that nothing is cached."""
    workload = fixed_lengths(batch, length, 1)
    return [{"prompt_token_ids": workload.prompt(row, vocabulary)} for row in range(batch)]


def add_batch(llm: Any, prompts: list[Any], adapters: list[Any], tokens: int, name: str) -> None:
    """Hand in a batch and run its prompts."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        llm.llm_engine.add_request(f"{name}-{i}", prompt, params, lora_request=adapter)
    started = 0
    while started < len(prompts):
        started += sum(len(o.outputs[0].token_ids) == 1 for o in llm.llm_engine.step())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="compiled")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=10, help="of each engine (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="in a turn (%(default)s)")
    parser.add_argument("--top", type=int, default=14, help="operators shown (%(default)s)")
    args = parser.parse_args()

    from vllm_pedro import PedroRequest  # before vLLM's LLM, which then knows enable_pedro

    # isort: split
    import torch
    from vllm import LLM

    from vllm_pedro.bench.results import load_average
    from vllm_pedro.bench.tables import table

    if args.model is None:
        from vllm_pedro.fetch import fetch_model

        args.model = str(fetch_model(progress=False))
    steps = args.turns * args.steps
    tokens = 2 * steps + 8
    settings = {
        "model": args.model,
        "dtype": args.dtype,
        "enforce_eager": args.mode == "eager",
        "max_model_len": args.prompt_tokens + tokens,
        "max_num_seqs": args.batch,
        "max_num_batched_tokens": max(2048, args.prompt_tokens + tokens),
        "kv_cache_memory_bytes": 1 << 29,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
        "seed": 0,
    }
    before = load_average()
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(args.model, Path(folder, "adapters"), "pedro", args.batch)
        tenants = [PedroRequest(p.name, i + 1, str(p)) for i, p in enumerate(paths)]
        base = LLM(**settings)
        pedro = LLM(
            **settings,
            enable_pedro=True,
            max_pedros=args.batch,
            pedro_target_modules=list(MODULES),
        )
        vocabulary = base.llm_engine.model_config.get_vocab_size()
        prompts = prompts_of(args.batch, args.prompt_tokens, vocabulary)
        engines = {"base": (base, [None] * args.batch), "PEDRO": (pedro, tenants)}
        for name, (llm, adapters) in engines.items():
            add_batch(llm, prompts, adapters, tokens, name)
        wall: dict[str, list[float]] = defaultdict(list)
        own: dict[str, dict[str, float]] = {name: defaultdict(float) for name in engines}
        calls: dict[str, dict[str, int]] = {name: defaultdict(int) for name in engines}
        for is_profiled in (False, True):
            for _ in range(args.turns):
                for name, (llm, _) in engines.items():
                    if not is_profiled:
                        start = time.perf_counter()
                        for _ in range(args.steps):
                            llm.llm_engine.step()
                        wall[name].append(1e3 * (time.perf_counter() - start) / args.steps)
                        continue
                    with torch.profiler.profile(
                        activities=[torch.profiler.ProfilerActivity.CPU]
                    ) as profile:
                        start = time.perf_counter()
                        for _ in range(args.steps):
                            llm.llm_engine.step()
                        passed = 1e6 * (time.perf_counter() - start)
                    inside = 0.0
                    for event in profile.key_averages():
                        own[name][event.key] += event.self_cpu_time_total
                        calls[name][event.key] += event.count
                        inside += event.self_cpu_time_total
                    own[name]["(outside of torch's operators)"] += passed - inside
    ratio = [b / p for b, p in zip(wall["base"], wall["PEDRO"], strict=True)]
    print(
        f"ms per step, unprofiled, median: base {statistics.median(wall['base']):.2f}, PEDRO "
        f"{statistics.median(wall['PEDRO']):.2f}; base / PEDRO {Spread.of(ratio).format(3)}; "
        f"{torch.get_num_threads()} threads, "
        f"load average before {before}, after {load_average()}"
    )
    total = {name: sum(times.values()) / steps for name, times in own.items()}
    names = sorted(
        {*own["base"], *own["PEDRO"]},
        key=lambda key: -abs(own["PEDRO"][key] - own["base"][key]),
    )
    rows = []
    for key in [*names[: args.top], "all"]:
        b, p = (total[n] if key == "all" else own[n][key] / steps for n in engines)
        counts = "/".join(f"{calls[n][key] / steps:.0f}" for n in engines if key != "all")
        share = f"{100 * (p - b) / total['base']:+.1f} %"
        rows.append((key[:60], counts, f"{b:.0f}", f"{p:.0f}", f"{p - b:+.0f}", share))
    headers = ("operator, own time", "calls per step", "base, µs", "PEDRO, µs", "difference")
    print(table((*headers, "of base's step"), rows))


if __name__ == "__main__":
    main()
