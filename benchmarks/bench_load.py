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
ADAPTERS, WARM_UP, HOST_SLOTS = 144, 48, 32


def measure(model: str, paths: list[Path]) -> dict[str, list[float]]:
    """Milliseconds of this process's CPU time by part, one of each adapter after the warm-up."""
    import torch

    from vllm_pedro.backbone import BackboneShape
    from vllm_pedro.bench.adapters import MODULES, PEDRO_RANK
    from vllm_pedro.integration import plugin
    from vllm_pedro.integration.frontend.registry import AdapterRegistry
    from vllm_pedro.serving.adapters import AdapterBank, AdapterLimits, AdapterReader, HostCache
    from vllm_pedro.serving.columns import StoreColumns
    from vllm_pedro.serving.spec import RequestSpec

    importlib.import_module("vllm.logger")
    plugin.register()  # shows this package's log lines as vLLM's
    torch.set_num_threads(1)
    shape, cpu = BackboneShape.from_pretrained(model), torch.device("cpu")
    limits = AdapterLimits(shape, PEDRO_RANK, MODULES)
    registry = AdapterRegistry(limits)
    reader = AdapterReader(limits, StoreColumns.of(shape, MODULES))
    host = HostCache(HOST_SLOTS, reader)
    bank = AdapterBank(8 * limits.largest_blob, reader, cpu, host)
    found: dict[str, list[float]] = {part: [] for part in PARTS}

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
    return {part: times[WARM_UP:] for part, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--before", metavar="REVISION", help="measure this one, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folders", type=Path, help=argparse.SUPPRESS)  # of a process it starts
    args = parser.parse_args()
    if args.folders:
        print(json.dumps(measure(args.model, sorted(args.folders.resolve().iterdir()))))
        return

    from bench_change import sources

    from vllm_pedro.bench.adapters import folder_bytes, write_adapters
    from vllm_pedro.bench.figures import Spread
    from vllm_pedro.bench.tables import table
    from vllm_pedro.fetch import fetch_model

    model = args.model or str(fetch_model(progress=False))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapters"
        paths = write_adapters(model, folder, "pedro", ADAPTERS)
        names = ["before", "now"] if args.before else ["now"]
        trees = {
            name: stack.enter_context(sources(args.before if name == "before" else None))
            for name in names
        }
        command = [sys.executable, __file__, "--model", model, "--folders", str(folder)]
        runs: dict[str, list[dict[str, list[float]]]] = {name: [] for name in names}
        for repeat in range(args.repeats):
            for name in names if repeat % 2 else reversed(names):
                environment = os.environ | {"PYTHONPATH": str(trees[name])}
                # What it logs goes nowhere, but is made.
                pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
                process = subprocess.run(command, env=environment, check=True, **pipes)
                runs[name].append(json.loads(process.stdout.splitlines()[-1]))
        size = folder_bytes(paths[0]) / 2**20
    print(
        f"{ADAPTERS - WARM_UP} adapters of {size:.2f} MiB after {WARM_UP} to warm up; ms of CPU "
        f"time: median over the adapters of the median run (lowest and highest of {args.repeats})"
    )
    parts = (*PARTS, "all")
    rows = [
        [name, *(Spread.of(statistics.median(r[part]) for r in found).format() for part in parts)]
        for name, found in runs.items()
    ]
    print(table(("", *parts), rows))


if __name__ == "__main__":
    main()
