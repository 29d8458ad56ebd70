"""Decode steps of PEDRO beside the plain backbone's, one by one in turn.

Both engines live in this process and take turns step by step, so that a machine whose speed drifts,
or that somebody else uses too, hurts them alike: the two steps of a pair are milliseconds apart. A
repeat is one batch decoded from its first to its last token by both; its ratio is the plain
engine's time over PEDRO's (1 is as fast, below 1 is slower). Time is that of the wall and, where
other programs take processors away, the CPU time of this process beside it.

    python benchmarks/bench_decode.py --mode compiled --repeats 7
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_offline import make_adapters, prompts_of


class Batch:
    """One batch in one engine, stepped from outside."""

    def __init__(self, llm: Any, prompts: list[Any], adapters: list[Any], tokens: int) -> None:
        from vllm import SamplingParams

        self.engine = llm.llm_engine
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        for i, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
            self.engine.add_request(str(i), prompt, params, lora_request=adapter)

    def step(self) -> tuple[float, float]:
        """Wall and CPU seconds of one engine step."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.engine.step()
        return time.perf_counter() - wall, time.process_time() - cpu

    @property
    def is_running(self) -> bool:
        return bool(self.engine.has_unfinished_requests())


def repeat_once(
    engines: tuple[Any, Any], prompts: list[Any], adapters: list[Any], tokens: int
) -> dict[str, float]:
    """Seconds of each engine's prefill and decode for one batch, stepped in turn."""
    none: list[Any] = [None] * len(prompts)
    batches = (
        Batch(engines[0], prompts, none, tokens),
        Batch(engines[1], prompts, adapters, tokens),
    )
    total = {f"{n}_{p}_{c}": 0.0 for n in "ab" for p in ("ttft", "decode") for c in ("wall", "cpu")}
    for name, batch in zip("ab", batches, strict=True):
        wall, cpu = batch.step()  # the whole batch's prompts
        total[f"{name}_ttft_wall"] += wall
        total[f"{name}_ttft_cpu"] += cpu
    order = 0
    while batches[0].is_running or batches[1].is_running:
        for which in (order, 1 - order):
            if batches[which].is_running:
                wall, cpu = batches[which].step()
                total[f"{'ab'[which]}_decode_wall"] += wall
                total[f"{'ab'[which]}_decode_cpu"] += cpu
        order = 1 - order
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="compiled")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()

    import torch
    import vllm

    from vllm_pedro import PedroRequest
    from vllm_pedro.fetch import fetch_model
    from vllm_pedro.ops import backends

    model = args.model or str(fetch_model())
    settings: dict[str, Any] = {
        "model": model,
        "dtype": args.dtype,
        "enforce_eager": args.mode == "eager",
        "max_model_len": args.prompt_tokens + args.output_tokens + 1,
        "max_num_seqs": args.batch,
        "max_num_batched_tokens": args.batch * args.prompt_tokens,
        "kv_cache_memory_bytes": 1 << 29,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }
    base = vllm.LLM(**settings)
    pedro = vllm.LLM(**settings, enable_pedro=True, max_pedros=args.batch)
    prompts = prompts_of(args.batch, args.prompt_tokens, base.model_config.get_vocab_size())
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_adapters(model, args.batch, Path(folder))
        tenants = [PedroRequest(p.name, i + 1, str(p)) for i, p in enumerate(paths)]
        cases: dict[str, list[Any]] = {
            "no adapter": [None] * args.batch,
            "1 tenant": [tenants[0]] * args.batch,
            f"{args.batch} tenants": tenants,
        }
        for repeat in range(args.repeats + 1):
            for name, adapters in cases.items():
                # Other prompts each time: kept vectors must not be found.
                fresh = [
                    {
                        "prompt_token_ids": [
                            (t + 13 * repeat) % 40_000 for t in p["prompt_token_ids"]
                        ]
                    }
                    for p in prompts
                ]
                times = repeat_once((base, pedro), fresh, adapters, args.output_tokens)
                if repeat:  # the first is a warm-up
                    results.setdefault(name, []).append(times)
    print(f"{args.mode}, {torch.get_num_threads()} threads, operators: {backends.cpu}")
    print(f"{'ratio to base: median (min-max)':34}{'wall':>22}{'CPU time':>22}")
    for name, repeats in results.items():
        for phase in ("decode", "ttft"):
            cells = []
            for clock in ("wall", "cpu"):
                r = [t[f"a_{phase}_{clock}"] / t[f"b_{phase}_{clock}"] for t in repeats]
                cells.append(f"{statistics.median(r):.3f} ({min(r):.3f}-{max(r):.3f})")
            print(f"{name + ', ' + phase:34}{cells[0]:>22}{cells[1]:>22}")
    if args.json:
        record = {
            "settings": {k: v for k, v in settings.items() if k != "model"},
            "vllm": vllm.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "operators": backends.cpu,
            "seconds": results,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
