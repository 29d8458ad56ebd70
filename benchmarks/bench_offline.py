"""Decode throughput of PEDRO beside the plain backbone, in one run, alternating.

Both engines are alive at once and take turns, so that a machine whose speed drifts hurts
them alike. The engine with PEDRO off serves as base; the other serves the same prompts without
adapters, with one tenant, and with as many tenants as rows.

    python benchmarks/bench_offline.py --mode eager --repeats 5
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make_adapters(model: str, count: int, folder: Path) -> list[Path]:
    """Random adapters of the paper's size (r = 12 on q, v, up), each with other weights."""
    from transformers import AutoConfig

    from vllm_pedro import BackboneShape, PedroConfig, save_adapter
    from vllm_pedro.adapter import init_adapter

    shape = BackboneShape.from_hf_config(AutoConfig.from_pretrained(model))
    config = PedroConfig(input_norm="rms")
    paths = []
    for seed in range(count):
        adapter = init_adapter(config, shape, seed=seed, scale=0.01)
        paths.append(folder / f"tenant-{seed}")
        save_adapter(paths[-1], adapter.config, adapter.tensors)
    return paths


def prompts_of(batch: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Token-id prompts that differ from their first token, so that nothing is cached."""
    return [
        {"prompt_token_ids": [(7919 * (row + 1) + 31 * i) % vocabulary for i in range(length)]}
        for row in range(batch)
    ]


def run_once(llm: Any, prompts: Sequence[Any], tokens: int, adapters: Sequence[Any]) -> float:
    """Output tokens per second of one batch."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    kwargs: dict[str, Any] = {"lora_request": list(adapters)} if any(adapters) else {}
    start = time.perf_counter()
    outputs = llm.generate(list(prompts), params, use_tqdm=False, **kwargs)
    seconds = time.perf_counter() - start
    assert all(len(o.outputs[0].token_ids) == tokens for o in outputs)
    return sum(len(o.outputs[0].token_ids) for o in outputs) / seconds


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

    from vllm_pedro import PedroRequest  # before vLLM's LLM, which then knows enable_pedro

    # isort: split
    import vllm
    from vllm import LLM

    if args.model is None:
        from vllm_pedro.fetch import fetch_model

        args.model = str(fetch_model(progress=False))
    engine = {
        "model": args.model,
        "dtype": args.dtype,
        "enforce_eager": args.mode == "eager",
        "max_model_len": args.prompt_tokens + args.output_tokens,
        "max_num_seqs": args.batch,
        "max_num_batched_tokens": args.batch * args.prompt_tokens,
        "kv_cache_memory_bytes": 1 << 29,
        "enable_prefix_caching": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        paths = make_adapters(args.model, args.batch, Path(folder))
        tenants = [PedroRequest(p.name, i + 1, str(p)) for i, p in enumerate(paths)]
        base = LLM(**engine)
        pedro = LLM(**engine, enable_pedro=True, max_pedros=args.batch)
        vocabulary = base.llm_engine.model_config.get_vocab_size()
        prompts = prompts_of(args.batch, args.prompt_tokens, vocabulary)
        none: list[Any] = [None] * args.batch
        cases = {
            "base": (base, none),
            "PEDRO, no adapter": (pedro, none),
            "PEDRO, 1 tenant": (pedro, [tenants[0]] * args.batch),
            f"PEDRO, {args.batch} tenants": (pedro, tenants),
        }
        speeds: dict[str, list[float]] = {name: [] for name in cases}
        for repeat in range(args.repeats + 1):
            for name, (llm, adapters) in cases.items():
                speed = run_once(llm, prompts, args.output_tokens, adapters)
                if repeat:  # the first is a warm-up
                    speeds[name].append(speed)
    result = {
        "settings": {k: v for k, v in engine.items() if k != "model"} | {"mode": args.mode},
        "vllm": vllm.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tokens_per_second": speeds,
    }
    print(f"{'':24}{'tok/s':>8}   {'ratio to base: median (min-max)'}")
    for name, values in speeds.items():
        ratios = [v / b for v, b in zip(values, speeds["base"], strict=True)]
        print(
            f"{name:24}{statistics.median(values):8.1f}   {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}-{max(ratios):.3f})"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    del base, pedro
    gc.collect()


if __name__ == "__main__":
    main()
