"""The forms of each operation that dispatch can choose from on a CPU, one beside the other.

Time is CPU time of one thread, the lowest of many short rounds that take turns, because that is
what other programs on the machine disturb least.

    python benchmarks/bench_dispatch.py --model SmolLM2-135M --tokens 16
"""

from __future__ import annotations

import argparse
import time

import torch
from gpu_check import MODELS, Plan, compiled_layers, operator_cases

from vllm_pedro.ops import backends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=[m for m in MODELS if m != "small"], required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = Plan("cpu", small=False)
    cases = list(operator_cases(args.model, args.tokens, plan))
    cases += [(n, c, 0) for n, c in compiled_layers(args.model, args.tokens, plan).items()]
    best = [float("inf")] * len(cases)
    with torch.inference_mode():
        for _, call, _ in cases:
            call()  # compiles
        for _ in range(args.rounds):
            for i, (_, call, _) in enumerate(cases):
                begin = time.process_time()
                for _ in range(20):
                    call()
                best[i] = min(best[i], (time.process_time() - begin) / 20)
    print(f"operators: {backends.cpu}; torch {torch.__version__}; bfloat16, 1 thread")
    for (name, _, moved), seconds in zip(cases, best, strict=True):
        print(f"{1e6 * seconds:9.1f} µs {moved / seconds / 1e9:7.2f} GB/s  {name}")


if __name__ == "__main__":
    main()
