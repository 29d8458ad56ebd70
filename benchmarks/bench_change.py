"""One change, before and after, in one run: base, PEDRO as it was and PEDRO as it is, in turns.

The revision before is checked out beside this one (`git worktree`), and each engine runs in a
process of its own that imports its own sources, so none is favoured by starting first. In every
repeat all engines run the same batch, in turned order every other time; ratios are taken within a
repeat. `--without-native` leaves the revision before without its native operators.

    python benchmarks/bench_change.py --before HEAD~1 --mode compiled
    python benchmarks/bench_change.py --before HEAD --without-native --mode eager
"""

from __future__ import annotations

import argparse
import contextlib
import json
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
def sources_of(revision: str, native: bool) -> Iterator[Path]:
    """A work tree of `revision`, with its native library built or copied."""
    with tempfile.TemporaryDirectory(prefix="vllm-pedro-before-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "--detach", "-q", str(tree), revision], check=True)
        try:
            if native:
                same = [*git, "diff", "--quiet", revision, "--", "csrc", "setup.py"]
                library = ROOT / "vllm_pedro" / "_C.so"
                if library.exists() and subprocess.run(same, check=False).returncode == 0:
                    shutil.copy(library, tree / "vllm_pedro" / "_C.so")
                else:
                    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                    subprocess.run(build, cwd=tree, check=True)
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False)


@contextlib.contextmanager
def sources_now() -> Iterator[Path]:
    """A copy of this tree's package, so that it may be edited while this runs."""
    with tempfile.TemporaryDirectory(prefix="vllm-pedro-after-") as folder:
        shutil.copytree(ROOT / "vllm_pedro", Path(folder) / "vllm_pedro")
        yield Path(folder)


@contextlib.contextmanager
def imported_from(tree: Path) -> Iterator[None]:
    """Processes that are started now import from `tree`: a spawned one gets a copy of sys.path."""
    sys.path.insert(0, str(tree))
    try:
        yield
    finally:
        sys.path.remove(str(tree))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", default="HEAD", metavar="REVISION", help="(%(default)s)")
    parser.add_argument("--without-native", action="store_true")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="compiled")
    parser.add_argument("--model", help="model folder; default the 135M model of the demo")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the measurements here")
    args = parser.parse_args()

    from vllm_pedro.bench import figures
    from vllm_pedro.bench.adapters import write_adapters
    from vllm_pedro.bench.cases import EngineSpec, Job
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
    }
    workload = fixed_lengths(args.batch, args.prompt_tokens, args.output_tokens, "decode-heavy")
    common = (args.mode == "compiled", settings, args.batch + 1, args.batch, available_threads())
    with contextlib.ExitStack() as stack:
        now = stack.enter_context(sources_now())
        tree = stack.enter_context(sources_of(args.before, not args.without_native))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = write_adapters(model, folder / "adapters", "pedro", args.batch)
        engines: dict[str, EngineProcess] = {}
        for name, kind, source in (
            ("base", "base", now),
            ("before", "pedro", tree),
            ("after", "pedro", now),
        ):
            print(f"starting {name} ...", file=sys.stderr)
            with imported_from(source):
                engines[name] = EngineProcess(EngineSpec(kind, *common), folder / f"{name}.log")
            stack.callback(engines[name].close)
        nobody = Job(workload.with_tenants([None] * args.batch))
        tenants = list(range(args.batch))
        everybody = Job(workload.with_tenants(tenants), tuple((p.name, str(p)) for p in paths))
        cases = [("base", nobody, "base")]
        cases += [(name, nobody, f"{name}, no adapter") for name in ("before", "after")]
        cases += [
            (name, everybody, f"{name}, {args.batch} tenants") for name in ("before", "after")
        ]
        found: dict[str, list[dict[str, float]]] = {label: [] for _, _, label in cases}
        for repeat in range(args.repeats + 1):
            for name, job, label in cases if repeat % 2 else cases[::-1]:
                measures = figures.measure(engines[name].run(job))
                if repeat:  # the first is a warm-up
                    found[label].append(measures)
    print(f"{args.mode}, {args.dtype}, {args.batch} rows of {args.prompt_tokens} + ", end="")
    print(f"{args.output_tokens} tokens, {common[-1]} threads; before: {args.before}", end="")
    print(", without native operators" if args.without_native else "")

    def row(label: str, mine: str, other: str) -> list[str]:
        pairs = list(zip(found[mine], found[other], strict=True))
        ratios = ([b[m] / a[m] for a, b in pairs] for m in ("itl_mean_ms", "ttft_mean_ms"))
        return [label, *(figures.Spread.of(values).format(3) for values in ratios)]

    rows = [row(label, label, "base") for label in found]
    rows += [
        row(f"before / after, {which}", f"after, {which}", f"before, {which}")
        for which in ("no adapter", f"{args.batch} tenants")
    ]
    print(table(("base over it (1 is as fast)", "time per token", "first token"), rows))
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": None}} | found) + "\n")


if __name__ == "__main__":
    main()
