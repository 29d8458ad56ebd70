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
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm_pedro.bench.adapters import write_adapters
from vllm_pedro.bench.cases import engine_options
from vllm_pedro.bench.figures import Spread
from vllm_pedro.bench.results import load_average
from vllm_pedro.bench.tables import table
from vllm_pedro.bench.workloads import fixed_lengths
from vllm_pedro.integration.stepped import SteppedLLM

TURNS, STEPS = 10, 10  # of each engine; in a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="compiled")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--top", type=int, default=14, help="operators shown (%(default)s)")
    args = parser.parse_args()
    if args.model is None:
        from vllm_pedro.fetch import fetch_model

        args.model = str(fetch_model(progress=False))
    tokens = 2 * TURNS * STEPS + 8
    settings: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "max_model_len": args.prompt_tokens + tokens,
        "max_num_seqs": args.batch,
        "max_num_batched_tokens": max(2048, args.prompt_tokens + tokens),
        "kv_cache_memory_bytes": 1 << 29,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }
    before = load_average()
    workload = fixed_lengths(args.batch, args.prompt_tokens, 1)
    engines = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_adapters(args.model, Path(folder, "adapters"), "pedro", args.batch)
        for kind in ("base", "pedro"):
            llm = SteppedLLM(settings | engine_options(f"{kind}-{args.mode}", args.batch))
            engines[kind] = llm
            llm.begin()
            for row, path in enumerate(paths):
                tenant = (
                    llm.adapter(kind, path.name, row + 1, str(path)) if kind != "base" else None
                )
                llm.add(row, workload.prompt(row, llm.vocabulary), tokens, tenant)
            started = 0
            while started < args.batch:
                started += sum(new == 1 for _, new, _ in llm.step())
    wall: dict[str, list[float]] = {kind: [] for kind in engines}
    own: dict[str, Counter[str]] = {kind: Counter() for kind in engines}
    calls: dict[str, Counter[str]] = {kind: Counter() for kind in engines}

    def turn(llm: SteppedLLM) -> float:
        start = time.perf_counter()
        for _ in range(STEPS):
            llm.step()
        return 1e6 * (time.perf_counter() - start)

    import torch

    for _ in range(TURNS):
        for kind, llm in engines.items():
            wall[kind].append(turn(llm) / STEPS / 1e3)
    for _ in range(TURNS):
        for kind, llm in engines.items():
            cpu = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=cpu) as profile:
                outside = turn(llm)
            for event in profile.key_averages():
                own[kind][event.key] += event.self_cpu_time_total
                calls[kind][event.key] += event.count
                outside -= event.self_cpu_time_total
            own[kind]["(outside of torch's operators)"] += outside
    ratios = [b / p for b, p in zip(wall["base"], wall["pedro"], strict=True)]
    print(
        f"ms per step, unprofiled, median: base {statistics.median(wall['base']):.2f}, PEDRO "
        f"{statistics.median(wall['pedro']):.2f}; base / PEDRO {Spread.of(ratios).format(3)}; "
        f"{torch.get_num_threads()} threads, load average before {before}, after {load_average()}"
    )
    total = own["base"].total()
    names = sorted(own["base"] | own["pedro"], key=lambda k: -abs(own["pedro"][k] - own["base"][k]))
    for kind in engines:
        own[kind]["all"] = own[kind].total()
    rows = []
    for key in [*names[: args.top], "all"]:
        b, p = (own[kind][key] / TURNS / STEPS for kind in engines)
        counts = "/".join(f"{calls[kind][key] / TURNS / STEPS:.0f}" for kind in engines)
        share = f"{100 * (own['pedro'][key] - own['base'][key]) / total:+.1f} %"
        rows.append((key[:60], counts, f"{b:.0f}", f"{p:.0f}", f"{p - b:+.0f}", share))
    headers = ("operator, own time", "calls per step", "base, µs", "PEDRO, µs", "difference")
    print(table((*headers, "of base's step"), rows))


if __name__ == "__main__":
    main()
