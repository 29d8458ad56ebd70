"""One change, before and after, in one run: base, PEDRO as it was and PEDRO as it is, in turns.

Each engine runs in a process of its own that imports its own sources, so none is favoured by
starting first. In every repeat all engines run the same batch, in turned order every other time;
ratios are taken within a repeat. The revision before has to start engines as this one does.

    python benchmarks/bench_change.py --before HEAD~1 --mode compiled
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", default="HEAD", metavar="REVISION", help="(%(default)s)")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="compiled")
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    from vllm_pedro.bench import figures
    from vllm_pedro.bench.adapters import write_adapters
    from vllm_pedro.bench.cases import engine_options
    from vllm_pedro.bench.engines import EngineProcess, available_threads
    from vllm_pedro.bench.tables import table
    from vllm_pedro.bench.workloads import fixed_lengths
    from vllm_pedro.fetch import fetch_model

    model = args.model or str(fetch_model(progress=False))
    settings: dict[str, Any] = {
        "model": model,
        "dtype": args.dtype,
        "max_model_len": args.prompt_tokens + args.output_tokens + 8,
        "max_num_seqs": args.batch,
        "max_num_batched_tokens": max(2048, args.batch * args.prompt_tokens),
        "kv_cache_memory_bytes": 1 << 29,
        "enable_prefix_caching": False,
        "distributed_executor_backend": "uni",
    }
    workload = fixed_lengths(args.batch, args.prompt_tokens, args.output_tokens, "decode-heavy")
    tenants = workload.with_tenants(range(args.batch))
    with contextlib.ExitStack() as stack:
        trees = {"after": stack.enter_context(sources())}
        trees |= {"base": trees["after"], "before": stack.enter_context(sources(args.before))}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = write_adapters(model, folder / "adapters", "pedro", args.batch)
        engines = {}
        for name in ("base", "before", "after"):
            print(f"starting {name} ...", file=sys.stderr)
            engine = f"{'base' if name == 'base' else 'pedro'}-{args.mode}"
            keywords = settings | engine_options(engine, args.batch)
            sys.path.insert(0, str(trees[name]))  # a spawned process gets a copy of it
            engines[name] = EngineProcess(engine, keywords, folder / f"{name}.log")
            sys.path.pop(0)
            stack.callback(engines[name].close)
        many = f"{args.batch} tenants"
        cases = {(name, which): [] for which in ("no adapter", many) for name in engines}
        del cases["base", many]
        for repeat in range(args.repeats + 1):
            for name, which in cases if repeat % 2 else reversed(cases):
                task = (tenants, paths) if which == many else (workload,)
                measures = figures.measure(engines[name].run(*task))
                if repeat:  # the first is a warm-up
                    cases[name, which].append(measures)
    print(
        f"{args.mode}, {args.dtype}, {args.batch} rows of {args.prompt_tokens} + "
        f"{args.output_tokens} tokens, {available_threads()} threads; before: {args.before}"
    )

    def row(label: str, mine: tuple[str, str], other: tuple[str, str]) -> list[str]:
        pairs = list(zip(cases[mine], cases[other], strict=True))
        ratios = ([b[m] / a[m] for a, b in pairs] for m in ("itl_mean_ms", "ttft_mean_ms"))
        return [label, *(figures.Spread.of(values).format(3) for values in ratios)]

    rows = [row(f"base / {', '.join(case)}", case, ("base", "no adapter")) for case in cases]
    for which in ("no adapter", many):
        rows.append(row(f"before / after, {which}", ("after", which), ("before", which)))
    print(table(("ratio of times (1 is as fast)", "time per token", "first token"), rows))


if __name__ == "__main__":
    main()
