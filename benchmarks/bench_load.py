"""What a tenant's first request costs for its adapter, part by part, in CPU time.

Front end: the folder is found, read and checked. Host: the worker reads it and packs it in host
memory. Device: the blob is copied from there, between two steps of a batch that waits; an engine on
the CPU does not make this copy, as it packs an adapter where prefills read it. Log lines are
written as an engine writes them. With `--before` another revision is measured in turns, each run in
a process of its own; all of them read the same folders.

    python benchmarks/bench_load.py
    python benchmarks/bench_load.py --before HEAD~1
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

PARTS = ("front end", "host", "device")


def measure(args: argparse.Namespace, paths: list[str]) -> dict[str, list[float]]:
    """Milliseconds of this process's CPU time by part, one of each adapter after the warm-up."""
    import torch
    from transformers import AutoConfig

    from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
    from vllm_pedro.bench.adapters import MODULES, PEDRO_RANK
    from vllm_pedro.integration import plugin
    from vllm_pedro.integration.frontend.registry import AdapterRegistry
    from vllm_pedro.serving.adapters import AdapterBank, AdapterLimits, AdapterReader, HostCache
    from vllm_pedro.serving.spec import RequestSpec
    from vllm_pedro.serving.store import VectorStore

    importlib.import_module("vllm.logger")
    plugin.register()  # shows this package's log lines as vLLM's
    torch.set_num_threads(1)
    shape = BackboneShape.from_hf_config(
        AutoConfig.from_pretrained(args.model, local_files_only=True)
    )
    rank, modules = (32, TARGET_MODULES) if args.wide else (PEDRO_RANK, MODULES)
    limits, cpu = AdapterLimits(shape, rank, modules), torch.device("cpu")
    registry = AdapterRegistry(limits)
    store = VectorStore(shape, modules, 1, 1, torch.bfloat16, cpu)
    reader = AdapterReader(limits, store.columns)
    host = HostCache(args.host_slots, reader)
    bank = AdapterBank(8 * limits.largest_blob, reader, cpu, host)
    found: dict[str, list[float]] = {part: [] for part in PARTS}

    def timed(part: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        result = call()
        found[part].append(1e3 * (time.process_time() - start))
        return result

    specs = []
    for i, folder in enumerate(paths):
        path = str(Path(folder).resolve())
        known = timed("front end", lambda path=path: registry.lookup(path))
        specs.append(RequestSpec(f"tenant-{i}", path, known.digest, 16, "prompt"))
    for spec in specs:
        timed("host", lambda spec=spec: host.get(spec))
        timed("device", lambda spec=spec: bank.make_resident(spec, {spec.digest}))
    found["all"] = [sum(times) for times in zip(*found.values(), strict=True)]
    return {part: times[args.warm_up :] for part, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--kind", choices=["pedro", "static"], default="pedro")
    parser.add_argument("--adapters", type=int, default=144)
    parser.add_argument("--warm-up", type=int, default=48, help="of these (%(default)s)")
    parser.add_argument("--wide", action="store_true", help="an engine's default rank and modules")
    parser.add_argument(
        "--host-slots",
        type=int,
        default=32,
        help="adapters in host memory; with as many as --adapters it only grows (%(default)s)",
    )
    parser.add_argument("--before", metavar="REVISION", help="measure this one, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folders", help=argparse.SUPPRESS)  # of the processes it starts
    args = parser.parse_args()
    if args.folders:
        paths = sorted(map(str, Path(args.folders).iterdir()))
        print(json.dumps(measure(args, paths)))
        return

    from bench_change import sources_now, sources_of

    from vllm_pedro.bench.adapters import folder_bytes, write_adapters
    from vllm_pedro.bench.figures import Spread
    from vllm_pedro.bench.tables import table
    from vllm_pedro.fetch import fetch_model

    model = args.model or str(fetch_model(progress=False))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapters"
        paths = write_adapters(model, folder, args.kind, args.adapters)
        trees = {"now": stack.enter_context(sources_now())}
        if args.before:
            trees = {"before": stack.enter_context(sources_of(args.before, False))} | trees
        command = [sys.executable, __file__, "--model", model, "--folders", str(folder)]
        command += ["--warm-up", str(args.warm_up), "--host-slots", str(args.host_slots)]
        command += ["--wide"] * args.wide
        runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in trees}
        for repeat in range(args.repeats):
            for name in trees if repeat % 2 else reversed(trees):
                environment = os.environ | {"PYTHONPATH": str(trees[name])}
                # What it logs goes nowhere, but is made.
                process = subprocess.run(
                    command,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    check=True,
                )
                runs[name].append(json.loads(process.stdout.splitlines()[-1]))
        size = folder_bytes(paths[0]) / 2**20
    print(
        f"{args.adapters - args.warm_up} adapters of {size:.2f} MiB, {args.kind}, after "
        f"{args.warm_up} to warm up; ms of CPU time: median over the adapters of the median run "
        f"(lowest and highest of {args.repeats})"
    )
    parts = (*PARTS, "all")
    rows = [
        [name, *(Spread.of(statistics.median(r[part]) for r in found).format() for part in parts)]
        for name, found in runs.items()
    ]
    print(table(("", *parts), rows))


if __name__ == "__main__":
    main()
