"""Who waits for whom: first tokens of the backbone's requests beside prompts of greatest length.

Two servers in turns, each with its own default budget: PEDRO, whose long prompts ask for adapters
and have to fit one step, and vLLM without it, which takes the same prompts in chunks.

    python benchmarks/bench_queue.py
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from vllm_pedro.bench.adapters import write_adapters
from vllm_pedro.bench.figures import Spread
from vllm_pedro.bench.servers import serve
from vllm_pedro.bench.serving import BASE_NAME, run_client
from vllm_pedro.bench.workloads import Request, Workload
from vllm_pedro.fetch import fetch_model

LENGTH, ANSWER = 1024, 8
SHORT = 32
TENANTS = 4


def arrivals(seconds: float, rate: float, every: int) -> Workload:
    """Short prompts at random times; each `every`-th one is long and a tenant's."""
    draw, now, requests = random.Random(0), 0.0, []
    while now < seconds:
        number = len(requests)
        is_long = number % every == every - 1
        prompt = LENGTH - ANSWER if is_long else SHORT
        tenant = number // every % TENANTS if is_long else None
        requests.append(Request(prompt, ANSWER, tenant, now))
        now += draw.expovariate(rate)
    return Workload("queue", tuple(requests), f"{len(requests)} in {seconds:g} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--rate", type=float, default=2, help="requests a second (%(default)s)")
    parser.add_argument("--every", type=int, default=20, help="each such one is long (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = args.model or str(fetch_model(progress=False))
    workload = arrivals(args.seconds, args.rate, args.every)
    plain = workload.with_tenants([None] * len(workload.requests))
    short = [r.tenant is None for r in workload.requests]
    flags = ["--served-model-name", BASE_NAME, "--enforce-eager", "--max-model-len", str(LENGTH)]
    flags += ["--kv-cache-memory-bytes", str(1 << 29), "--no-enable-prefix-caching"]
    found: dict[str, list[dict[str, float]]] = {"PEDRO": [], "vLLM": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_adapters(model, folder / "adapters", "pedro", TENANTS)
        more = ["--enable-pedro", "--pedro-modules", *(f"{p.name}={p}" for p in paths)]
        for repeat in range(args.repeats):
            for kind in found if repeat % 2 else reversed(found):
                own = [*flags, *more] if kind == "PEDRO" else flags
                with serve(model, own, folder / "server.log", shares_cores=False) as server:
                    asked, adapters = (workload, paths) if kind == "PEDRO" else (plain, [])
                    once = asked.requests[args.every - 1 :: args.every][:TENANTS]
                    for each in (replace(asked, requests=once, concurrency=1), asked):
                        timings = run_client(each, model, server, adapters, folder)
                pairs = list(zip((1e3 * t.ttft for t in timings), short, strict=True))
                mine = [value for value, is_short in pairs if is_short]
                others = [value for value, is_short in pairs if not is_short]
                found[kind].append(
                    {
                        "median": float(np.median(mine)),
                        "p99": float(np.percentile(mine, 99)),
                        "long prompts, median": float(np.median(others)),
                    }
                )
                print(kind, found[kind][-1], flush=True)
    print(f"first tokens, ms, {workload.rule}, {sum(short)} of them short")
    for measure in found["PEDRO"][0]:
        pairs = zip(found["PEDRO"], found["vLLM"], strict=True)
        ratio = Spread.of([a[measure] / b[measure] for a, b in pairs]).format(2)
        values = (Spread.of([one[measure] for one in runs]).format(0) for runs in found.values())
        print(f"{measure}: PEDRO {', vLLM '.join(values)}, ratio {ratio}")


if __name__ == "__main__":
    main()
