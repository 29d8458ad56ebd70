"""`vllm-pedro bench` without a server: engines of one kind each, alive at once, taking turns."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from ..errors import PedroError
from . import figures
from .adapters import folder_bytes, model_label, write_adapters
from .cases import ENGINES, EngineName, EngineSpec, Job, case_label, is_cpu
from .engines import EngineProcess, available_threads, start_engines
from .results import Recorder, load_average, say
from .workloads import (
    MIX_RULES,
    MIXES,
    Request,
    Workload,
    assign_tenants,
    closed_loop,
    fixed_lengths,
    paper_lengths,
    read_trace,
    replay,
)

FAMILIES: Final = (
    "decode",
    "overhead",
    "prefill",
    "mixed",
    "paper",
    "beam",
    "tenants",
    "mixes",
    "concurrency",
    "break-even",
    "trace",
)


@dataclass(frozen=True)
class Case:
    """One column of a comparison: an engine, and who asks.

    Attributes:
        kind: `plain`, `base`, `pedro`, `static` or `lora`.
        mode: `compiled` or `eager`.
        tenants: How many tenants ask; 0 for requests without an adapter.
    """

    kind: str
    mode: str
    tenants: int

    @property
    def engine(self) -> EngineName:
        """Which engine serves it."""
        return EngineName(f"{'pedro' if self.kind == 'static' else self.kind}-{self.mode}")

    @property
    def label(self) -> str:
        return case_label(self.kind, self.mode, self.tenants)


@dataclass(frozen=True)
class Comparison:
    """A workload and the cases that run it in turns.

    Attributes:
        family: What it is about; one of `FAMILIES`.
        x: Where it stands on its plot's axis: tenants, concurrency or prompt tokens.
        workload: Requests without tenants.
        mix: How tenants are assigned.
        cases: Run one after the other in each repeat.
    """

    family: str
    x: float
    workload: Workload
    mix: str
    cases: tuple[Case, ...]

    def job(self, case: Case, adapters: dict[str, list[Path]]) -> Job:
        """What an engine runs for a case."""
        count = len(self.workload.requests)
        if not case.tenants:
            return Job(self.workload.with_tenants([None] * count))
        tenants: Sequence[int | None] = [r.tenant for r in self.workload.requests]
        if any(t is None for t in tenants):  # else a trace, which comes with tenants
            tenants = assign_tenants(self.mix, count, case.tenants, self.workload.seed)
        folders = adapters[case.kind][: case.tenants]
        return Job(
            self.workload.with_tenants(tenants), tuple((path.name, str(path)) for path in folders)
        )


@dataclass(frozen=True)
class Sizes:
    """How much of everything; named as the options of `vllm-pedro bench offline`.

    Attributes:
        rows: Requests that run at once.
        prompt_tokens, output_tokens: Of the decode-heavy workload.
        tenants: Numbers of tenants.
        eager_tenants: LoRA and eager engines are measured up to so many tenants, because naive
            kernels take long.
        tenant_tokens: Prompt and output tokens of the requests of many tenants; None: the more
            tenants the shorter, see `_tenant_sweep`.
        concurrency: Of the closed loops.
        prompts: Prompt lengths of the break-even.
        max_model_len: Longest sequence.
        trace: A trace file.
        trace_requests, trace_speed, trace_shrink: See `workloads.replay`.
    """

    rows: int = 16
    prompt_tokens: int = 128
    output_tokens: int = 64
    tenants: Sequence[int] = (1, 8, 32, 128)
    eager_tenants: int = 128
    tenant_tokens: Sequence[int] | None = None
    concurrency: Sequence[int] = (1, 4, 16)
    prompts: Sequence[int] = (32, 128, 512)
    max_model_len: int = 1024
    trace: str | None = None
    trace_requests: int = 64
    trace_speed: float = 1.0
    trace_shrink: float = 1.0


QUICK: Final = Sizes(
    rows=16,
    prompt_tokens=64,
    output_tokens=32,
    tenants=(1, 16),
    prompts=(32, 256),
    max_model_len=280,
)


def comparisons(
    families: Sequence[str], engines: Sequence[str], sizes: Sizes, static: bool = False
) -> list[Comparison]:
    """Everything to measure, in order.

    Args:
        families: Of `FAMILIES`.
        engines: Of `ENGINES`; those that run.
        sizes: How much.
        static: Measure static vectors ((IA)3) too.
    """
    rows = sizes.rows
    simple = {
        "decode": lambda: _decode(sizes),
        "prefill": lambda: fixed_lengths(rows, _fit(sizes, 4, 480), 4, "prefill-heavy"),
        "mixed": lambda: _mixed(sizes),
        "paper": lambda: closed_loop(paper_lengths(2 * rows), rows),
        "beam": lambda: paper_lengths(max(2, rows // 2), beam_width=3),
    }
    result: list[Comparison] = []

    def add(
        workload: Workload, cases: tuple[Case, ...], x: float = 0.0, mix: str = "distinct"
    ) -> None:
        result.append(Comparison(family, x, workload, mix, cases))

    for family in families:
        if family in simple:
            tenants = [t for t in (1, rows) if t in sizes.tenants] or [max(1, sizes.tenants[0])]
            add(simple[family](), _cases(engines, tenants, static))
        elif family == "overhead":
            cases = tuple(
                case
                for mode in ("compiled", "eager")
                if f"base-{mode}" in engines and f"pedro-{mode}" in engines
                for case in (
                    Case("plain", mode, 0),
                    Case("base", mode, 0),
                    Case("pedro", mode, 0),
                    *(Case("pedro", mode, n) for n in (1, rows) if n in (1, *sizes.tenants)),
                )
            )
            add(replace(_decode(sizes), name="overhead"), cases)
        elif family == "tenants":
            result += _tenant_sweep(engines, sizes)
        elif family == "mixes":
            workload = closed_loop(fixed_lengths(2 * rows, 32, 16), rows)
            for mix in MIXES:
                rule = f"{workload.rule}; {MIX_RULES[mix]}"
                cases = _cases(engines, [1 if mix == "identical" else 2 * rows])
                add(replace(workload, name=f"mix: {mix}", rule=rule), cases, mix=mix)
        elif family == "concurrency":
            for level in sizes.concurrency:
                name = f"concurrency {level}"
                workload = fixed_lengths(2 * level, sizes.prompt_tokens, 32, name)
                add(closed_loop(workload, level), _cases(engines, [level]), float(level))
        elif family == "break-even":
            for length in sizes.prompts:
                workload = closed_loop(fixed_lengths(2, length, 8, f"prompt of {length}"), 1)
                add(workload, _cases(engines, [1]), float(length), "identical")
        elif family == "trace":
            result.append(_trace(engines, sizes))
        else:
            raise PedroError(f"unknown workload {family!r}; known: {', '.join(FAMILIES)}")
    return result


def _fit(sizes: Sizes, output_tokens: int, prompt_tokens: int) -> int:
    return min(prompt_tokens, sizes.max_model_len - output_tokens)


def _decode(sizes: Sizes) -> Workload:
    return fixed_lengths(sizes.rows, sizes.prompt_tokens, sizes.output_tokens, "decode-heavy")


def _mixed(sizes: Sizes) -> Workload:
    """Short prompts with long answers among long prompts with short ones."""
    kinds = [Request(32, sizes.output_tokens), Request(_fit(sizes, 4, 384), 4)]
    requests = kinds * sizes.rows
    random.Random(0).shuffle(requests)
    rule = (
        f"{len(requests)} requests, one half of {kinds[0].prompt_tokens} + "
        f"{kinds[0].output_tokens} tokens, the other of {kinds[1].prompt_tokens} + 4, shuffled"
    )
    return closed_loop(Workload("mixed", tuple(requests), rule), sizes.rows)


def _cases(
    engines: Sequence[str], tenants: Sequence[int], static: bool = False
) -> tuple[Case, ...]:
    cases = []
    for engine in map(EngineName, engines):
        if engine.kind in ("plain", "base"):
            cases.append(Case(engine.kind, engine.mode, 0))
            continue
        cases += [Case(engine.kind, engine.mode, count) for count in tenants]
        if engine.kind == "pedro" and static:
            cases.append(Case("static", engine.mode, tenants[-1]))
    return tuple(cases)


def _tenant_sweep(engines: Sequence[str], sizes: Sizes) -> list[Comparison]:
    """The same short requests by more and more tenants; beside each, the same by one tenant."""
    result = []
    for count in sizes.tenants:
        number = max(4 * sizes.rows, count)
        # Each tenant asks at least once, so that many tenants are many requests: shorter ones.
        lengths = (32, 16) if count <= 256 else (16, 8) if count <= 2048 else (8, 2)
        prompt, output = sizes.tenant_tokens or lengths
        name = f"{count:,} tenant{'s' if count > 1 else ''}, {prompt} + {output}"
        workload = closed_loop(fixed_lengths(number, prompt, output, name), sizes.rows)
        few = [
            e for e in engines if count <= sizes.eager_tenants or EngineName(e).mode == "compiled"
        ]
        cases = _cases(few, [1, count] if count > 1 else [1])
        result.append(Comparison("tenants", float(count), workload, "uniform", cases))
    return result


def _trace(engines: Sequence[str], sizes: Sizes) -> Comparison:
    if sizes.trace is None:
        raise PedroError("the workload 'trace' needs --trace FILE")
    tenants = max(t for t in sizes.tenants if t <= max(sizes.eager_tenants, 1))
    workload = replay(
        read_trace(sizes.trace),
        "trace " + Path(sizes.trace).name.partition(".")[0],
        count=sizes.trace_requests,
        longest=sizes.max_model_len,
        speed=sizes.trace_speed,
        shrink=sizes.trace_shrink,
        tenants=tenants,
        mix="skewed",
    )
    return Comparison("trace", 0.0, workload, "skewed", _cases(engines, [tenants]))


# The run -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How a run goes.

    Attributes:
        model: The model's folder.
        dtype: The model's dtype.
        repeats: Times each case is measured, at most.
        slots: Adapters on the device at once; None fits the workload, up to 33.
        kv_bytes: KV cache of each engine.
    """

    model: str
    dtype: str = "bfloat16"
    repeats: int = 5
    slots: int | None = None
    kv_bytes: int = 1 << 29


def run(
    plan: Sequence[Comparison],
    options: Options,
    recorder: Recorder,
    repeats: Iterable[int],
) -> None:
    """Measure everything, in as many `repeats` as come; results go to the recorder.

    In each repeat all cases of a workload run one after the other, in reverse order every other
    time. A repeat of few tokens warms each case up first and is not counted.
    """
    prefix_caching = any(c.workload.beam_width > 1 for c in plan)
    rows = max(_rows(c.workload) for c in plan)
    longest = max(LOAD_PROMPT + 1, *(c.workload.longest for c in plan))
    tenants = max((case.tenants for c in plan for case in c.cases), default=1) or 1
    # vLLM's CPU kernels give base rows a LoRA's weights if all slots are taken: one slot is spare.
    slots = options.slots or min(tenants, 32) + 1
    settings = {
        "model": options.model,
        "dtype": options.dtype,
        "max_model_len": longest + 8,
        "max_num_seqs": rows,
        "max_num_batched_tokens": max(2048, longest + 8),
        "kv_cache_memory_bytes": options.kv_bytes,
        "enable_prefix_caching": prefix_caching,
    }
    threads = available_threads()
    used = {case.engine for c in plan for case in c.cases}
    specs = [
        EngineSpec(e.kind, e.mode == "compiled", settings, slots, min(tenants, 256), threads)
        for e in ENGINES
        if e in used
    ]
    recorder.add_settings(
        {k: v for k, v in settings.items() if k != "model"}
        | {"adapter slots": slots, "host slots": min(tenants, 256), "threads": threads},
        model=model_label(options.model),
        cpu=is_cpu(),
    )
    with tempfile.TemporaryDirectory(prefix="vllm-pedro-adapters-") as folder:
        adapters = _write_all(plan, options.model, Path(folder))
        begin = _announce(len(specs))
        with start_engines(specs, begin) as processes:
            engines = {p.spec.engine: p for p in processes}
            _measure_loads(engines, adapters, recorder)
            _measure_all(plan, options, engines, adapters, recorder, repeats)
            for name, engine in engines.items():
                peak = engine.peak_bytes()
                kinds = [k for k in adapters if k == engine.spec.kind]
                recorder.add(
                    "engine",
                    engine=name,
                    peak_bytes=peak,
                    adapter_bytes={k: folder_bytes(adapters[k][0]) for k in kinds},
                    **engine.facts,
                )


def _announce(count: int) -> Callable[[EngineSpec], None]:
    numbers: Iterator[int] = iter(range(1, count + 1))

    def begin(spec: EngineSpec) -> None:
        say(f"starting engine {next(numbers)} of {count}: {spec.engine.label} ...")

    return begin


def _rows(workload: Workload) -> int:
    return (workload.concurrency or min(len(workload.requests), 256)) * workload.beam_width


def _write_all(plan: Sequence[Comparison], model: str, folder: Path) -> dict[str, list[Path]]:
    counts: dict[str, int] = {}
    for comparison in plan:
        for case in comparison.cases:
            if case.tenants:
                counts[case.kind] = max(counts.get(case.kind, LOADS), case.tenants)
    if counts:
        say(f"writing {sum(counts.values()):,} random adapters ...")
    return {k: write_adapters(model, folder / k, k, n) for k, n in counts.items()}


LOADS: Final = 8
"""Adapters whose loading is timed."""

LOAD_PROMPT: Final = 32
"""Prompt tokens of the requests that time it."""


def _measure_loads(
    engines: dict[EngineName, EngineProcess], adapters: dict[str, list[Path]], recorder: Recorder
) -> None:
    """How long a new adapter's first request takes longer than its second.

    One request at a time, one token; the first pass over the tenants finds none of them loaded.
    It also warms the engines up.
    """
    for name, engine in engines.items():
        workload = closed_loop(fixed_lengths(2 * LOADS, LOAD_PROMPT, 1, "loads"), 1)
        if engine.spec.kind in ("plain", "base"):
            engine.run(Job(workload))
            continue
        folders = adapters[engine.spec.kind][:LOADS]
        pairs = tuple((p.name, str(p)) for p in folders)
        engine.run(Job(workload.with_tenants([None] * (2 * LOADS))))
        order = [*range(len(folders)), *range(len(folders))]
        short = replace(workload, requests=workload.requests[: len(order)])
        timings = engine.run(Job(short.with_tenants(order), pairs))
        recorder.add(
            "load",
            engine=name,
            kind=engine.spec.kind,
            first_ms=[1e3 * t.ttft for t in timings[: len(folders)]],
            second_ms=[1e3 * t.ttft for t in timings[len(folders) :]],
        )


def _measure_all(
    plan: Sequence[Comparison],
    options: Options,
    engines: dict[EngineName, EngineProcess],
    adapters: dict[str, list[Path]],
    recorder: Recorder,
    repeats: Iterable[int],
) -> None:
    """Repeat by repeat, so that a run that is out of time has all workloads at least once."""
    total = options.repeats * sum(len(c.cases) for c in plan)
    bar = tqdm(total=total, unit="run", disable=None)  # on a terminal
    for comparison in plan:
        for case in comparison.cases:
            _warm_up(engines[case.engine], comparison.job(case, adapters))
    done = 0
    for repeat in repeats:
        for comparison in plan:
            order = comparison.cases if repeat % 2 == 0 else comparison.cases[::-1]
            for case in order:
                job = comparison.job(case, adapters)
                name = f"{comparison.workload.name}: {case.label}"
                bar.set_description(name)
                timings = engines[case.engine].run(
                    job, lambda tokens: bar.set_postfix_str(f"{tokens:,} tokens")
                )
                measures = figures.measure(timings)
                if job.workload.beam_width > 1:  # only the end of each request is known
                    measures = {k: measures[k] for k in ("seconds", "output_tokens_per_s")}
                fields: dict[str, Any] = {}
                if job.workload.num_tenants > 1 and job.workload.beam_width == 1:
                    fields["fairness"] = figures.fairness(figures.per_tenant(timings))
                recorder.add(
                    "measurement",
                    family=comparison.family,
                    x=comparison.x,
                    workload=comparison.workload.name,
                    rule=comparison.workload.rule,
                    kind=case.kind,
                    mode=case.mode,
                    tenants=case.tenants,
                    repeat=repeat,
                    measures=measures,
                    load_average=load_average(),
                    **fields,
                )
                bar.update()
                done += 1
                if bar.disable:
                    say(f"[{done}/{total}] {name}: {measures['output_tokens_per_s']:.1f} tokens/s")
    bar.close()


def _warm_up(engine: EngineProcess, job: Job) -> None:
    """A few tokens of the workload's first requests: buffers, adapters, code paths."""
    workload = job.workload
    requests = tuple(
        replace(r, output_tokens=min(2, r.output_tokens), arrival=0.0)
        for r in workload.requests[:64]
    )
    engine.run(Job(replace(workload, requests=requests), job.adapters))
