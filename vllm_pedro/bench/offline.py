"""`vllm-pedro bench` without a server: engines of one kind each, alive at once, taking turns."""

from __future__ import annotations

import contextlib
import random
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tqdm import tqdm

from ..errors import PedroError
from .adapters import folder_bytes, write_adapters
from .cases import (
    ENGINES,
    case_label,
    default_engines,
    engine_label,
    engine_options,
    is_cpu,
    shared_device,
    slots,
    split,
)
from .engines import EngineProcess, available_threads
from .results import Recorder, say
from .workloads import (
    MIXES,
    Request,
    Workload,
    assign_tenants,
    closed_loop,
    fixed_lengths,
    paper_lengths,
    replay,
)

EAGER_TENANTS: Final = 128
"""With more tenants only compiled engines are measured, as eager ones take too long, and LoRA's,
which on the CPU are all eager."""

LOADS: Final = 8
"""Adapters whose loading is timed."""

LOAD_PROMPT: Final = 32
"""Prompt tokens of the requests that time it."""


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
    tenants: int = 0

    @property
    def engine(self) -> str:
        """Which engine serves it."""
        return f"{'pedro' if self.kind == 'static' else self.kind}-{self.mode}"

    @property
    def label(self) -> str:
        return case_label(self.kind, self.mode, self.tenants)


@dataclass(frozen=True)
class Comparison:
    """A workload and the cases that run it in turns.

    Attributes:
        workload: Requests without tenants, or a trace, which comes with them.
        cases: Run one after the other in each repeat.
        x: Where it stands on its plot's axis: tenants, concurrency or prompt tokens.
        mix: How tenants are assigned.
        family: What it is about; one of `FAMILIES`.
    """

    workload: Workload
    cases: tuple[Case, ...]
    x: float = 0.0
    mix: str = "distinct"
    family: str = ""

    def task(self, case: Case, adapters: dict[str, list[Path]]) -> tuple[Workload, Sequence[Path]]:
        """What an engine runs for a case."""
        count = len(self.workload.requests)
        if not case.tenants:
            return self.workload.with_tenants([None] * count), ()
        workload = self.workload
        if not workload.num_tenants:
            tenants = assign_tenants(self.mix, count, case.tenants, workload.seed)
            workload = workload.with_tenants(tenants)
        return workload, adapters[case.kind][: case.tenants]


# What is compared --------------------------------------------------------------------------------


def plan(args: Namespace) -> list[Comparison]:
    """Everything that the options ask for, in order."""
    args.engines = args.engines or default_engines()
    args.few = set(args.tenants or (1, *args.rows))  # where a workload has one request a row
    args.tenants = sorted(set(args.tenants or (1, *args.rows, 8, 32, 128)))
    return [
        replace(comparison, family=family)
        for family in args.workloads
        for comparison in FAMILIES[family](args)
    ]


def _fit(args: Namespace, output_tokens: int, prompt_tokens: int) -> int:
    return min(prompt_tokens, args.max_model_len - output_tokens)


def _cases(args: Namespace, tenants: Sequence[int], static: bool = False) -> tuple[Case, ...]:
    cases = []
    for kind, mode in map(split, args.engines):
        adapted = kind in ("pedro", "lora")
        cases += [Case(kind, mode, count) for count in (tenants if adapted else (0,))]
        if kind == "pedro" and static:
            cases.append(Case("static", mode, tenants[-1]))
    return tuple(cases)


def _simple(make: Callable[[Namespace, int], Workload]) -> Callable[[Namespace], list[Comparison]]:
    """One workload for each number of rows, by no more tenants than rows."""

    def compare(args: Namespace) -> list[Comparison]:
        found = []
        for rows in args.rows:
            workload = make(args, rows)
            if len(args.rows) > 1:
                workload = replace(workload, name=f"{workload.name}, {rows} rows")
            tenants = sorted(t for t in args.few if t <= rows) or args.tenants[:1]
            found.append(Comparison(workload, _cases(args, tenants, args.static)))
        return found

    return compare


def _decode(args: Namespace, rows: int) -> Workload:
    return fixed_lengths(rows, args.prompt_tokens, args.output_tokens, "decode-heavy")


def _mixed(args: Namespace, rows: int) -> Workload:
    """Short prompts with long answers among long prompts with short ones."""
    kinds = [Request(32, args.output_tokens), Request(_fit(args, 4, 384), 4)]
    requests = kinds * rows
    random.Random(0).shuffle(requests)
    rule = (
        f"{len(requests)} requests, one half of {kinds[0].prompt_tokens} + "
        f"{kinds[0].output_tokens} tokens, the other of {kinds[1].prompt_tokens} + 4, shuffled"
    )
    return closed_loop(Workload("mixed", tuple(requests), rule), rows)


def _overhead(args: Namespace) -> list[Comparison]:
    rows = args.rows[-1]
    counts = sorted({1, rows} & {1, *args.tenants})
    cases: list[Case] = []
    for mode in ("compiled", "eager"):
        if {f"base-{mode}", f"pedro-{mode}"} <= set(args.engines):
            cases += [Case(kind, mode) for kind in ("plain", "base", "pedro")]
            cases += [Case("pedro", mode, count) for count in counts]
    return [Comparison(replace(_decode(args, rows), name="overhead"), tuple(cases))]


def _tenants(args: Namespace) -> list[Comparison]:
    """The same short requests by more and more tenants; beside each, the same by one tenant."""
    rows, result = args.rows[-1], []
    for count in args.tenants:
        # Each tenant asks at least once, so that many tenants are many requests: shorter ones.
        lengths = (32, 16) if count <= 256 else (16, 8) if count <= 2048 else (8, 2)
        prompt, output = args.tenant_tokens or lengths
        name = f"{count:,} tenant{'s' if count > 1 else ''}, {prompt} + {output}"
        workload = fixed_lengths(max(4 * rows, count), prompt, output, name)
        cases = _cases(args, sorted({1, count}))
        if count > EAGER_TENANTS:
            cases = tuple(case for case in cases if case.mode == "compiled" or case.kind == "lora")
        result.append(Comparison(closed_loop(workload, rows), cases, float(count), "uniform"))
    return result


def _mixes(args: Namespace) -> list[Comparison]:
    count = 2 * args.rows[-1]
    workload = closed_loop(fixed_lengths(count, 32, 16), args.rows[-1])
    result = []
    for mix, rule in MIXES.items():
        own = replace(workload, name=f"mix: {mix}", rule=f"{workload.rule}; {rule}")
        cases = _cases(args, [1 if mix == "identical" else count])
        result.append(Comparison(own, cases, mix=mix))
    return result


def _concurrency(args: Namespace) -> list[Comparison]:
    result = []
    for level in args.concurrency:
        workload = fixed_lengths(2 * level, args.prompt_tokens, 32, f"concurrency {level}")
        cases = _cases(args, [level])
        result.append(Comparison(closed_loop(workload, level), cases, float(level)))
    return result


def _break_even(args: Namespace) -> list[Comparison]:
    return [
        Comparison(
            closed_loop(fixed_lengths(2, length, 8, f"prompt of {length}"), 1),
            _cases(args, [1]),
            float(length),
            "identical",
        )
        for length in args.prompts
    ]


def _trace(args: Namespace) -> list[Comparison]:
    if args.trace is None:
        raise PedroError("the workload 'trace' needs --trace FILE")
    tenants = max([t for t in args.tenants if t <= EAGER_TENANTS] or [1])
    workload = replay(args, "trace", 64, tenants)
    return [Comparison(workload, _cases(args, [tenants]), mix="skewed")]


FAMILIES: Final[dict[str, Callable[[Namespace], list[Comparison]]]] = {
    "decode": _simple(_decode),
    "overhead": _overhead,
    "prefill": _simple(lambda a, rows: fixed_lengths(rows, _fit(a, 4, 480), 4, "prefill-heavy")),
    "mixed": _simple(_mixed),
    "paper": _simple(lambda _, rows: closed_loop(paper_lengths(2 * rows), rows)),
    "beam": _simple(lambda _, rows: paper_lengths(max(2, rows // 2), beam_width=3)),
    "tenants": _tenants,
    "mixes": _mixes,
    "concurrency": _concurrency,
    "break-even": _break_even,
    "trace": _trace,
}


# The run -----------------------------------------------------------------------------------------


def run(
    args: Namespace, plan: Sequence[Comparison], recorder: Recorder, repeats: Iterable[int]
) -> None:
    """Measure everything, in as many `repeats` as come; results go to the recorder.

    In each repeat all cases of a workload run one after the other, in reverse order every other
    time. A run of few tokens warms each case up first and is not counted.
    """
    workloads = [c.workload for c in plan]
    longest = max(LOAD_PROMPT + 1, *(w.longest for w in workloads)) + 8
    counts: dict[str, int] = {}  # tenants by kind of adapter
    for case in (case for c in plan for case in c.cases if case.tenants):
        counts[case.kind] = max(counts.get(case.kind, 1), case.tenants)
    tenants = max(counts.values(), default=1)
    settings = {
        "dtype": args.dtype,
        "max_model_len": longest,
        "max_num_seqs": max(
            (w.concurrency or min(len(w.requests), 256)) * w.beam_width for w in workloads
        ),
        "max_num_batched_tokens": max(2048, longest),
        "kv_cache_memory_bytes": args.kv_cache_mib << 20,
        "enable_prefix_caching": any(w.beam_width > 1 for w in workloads),
    }
    shown = {**settings, **slots(tenants), "threads": available_threads()}
    recorder.add_settings(args.model, shown)
    settings |= {"model": args.model, "distributed_executor_backend": "uni"}
    settings |= {"disable_log_stats": True, "use_tqdm_on_load": False, **shared_device()}
    used = {case.engine for c in plan for case in c.cases}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-pedro-")))
        if counts:
            say("writing random adapters ...")
        adapters = {
            kind: write_adapters(args.model, folder / kind, kind, max(count, LOADS))
            for kind, count in counts.items()
        }
        engines: dict[str, EngineProcess] = {}
        for name in (e for e in ENGINES if e in used):
            say(f"starting engine {len(engines) + 1} of {len(used)}: {engine_label(name)} ...")
            keywords = settings | engine_options(name, tenants, args.llm)
            engines[name] = EngineProcess(name, keywords, folder / f"{name}.log")
            stack.callback(engines[name].close)
            if is_cpu():  # on a GPU they start together
                engines[name].wait()
        if not is_cpu():
            for engine in engines.values():
                engine.wait()
        _measure_loads(engines, adapters, recorder)
        _measure_all(plan, args.repeats, engines, adapters, recorder, repeats)
        for name, engine in engines.items():
            kind, _ = split(name)
            disk = {kind: folder_bytes(adapters[kind][0])} if kind in adapters else {}
            facts = {"peak_bytes": engine.peak_bytes(), "adapter_bytes": disk, **engine.facts}
            recorder.add("engine", engine=name, **facts)


def _measure_loads(
    engines: dict[str, EngineProcess], adapters: dict[str, list[Path]], recorder: Recorder
) -> None:
    """How long a new adapter's first request takes longer than its second.

    One request at a time, one token; the first pass over the tenants finds none of them loaded.
    It also warms the engines up.
    """
    workload = closed_loop(fixed_lengths(2 * LOADS, LOAD_PROMPT, 1, "loads"), 1)
    for name, engine in engines.items():
        kind, _ = split(name)
        engine.run(workload)
        if kind not in adapters:
            continue
        order = [*range(LOADS), *range(LOADS)]
        timings = engine.run(workload.with_tenants(order), adapters[kind][:LOADS])
        first, second = (
            [1e3 * t.ttft for t in part] for part in (timings[:LOADS], timings[LOADS:])
        )
        recorder.add("load", engine=name, kind=kind, first_ms=first, second_ms=second)


def _measure_all(
    plan: Sequence[Comparison],
    most: int,
    engines: dict[str, EngineProcess],
    adapters: dict[str, list[Path]],
    recorder: Recorder,
    repeats: Iterable[int],
) -> None:
    """Repeat by repeat, so that a run that is out of time has all workloads at least once."""
    for comparison in plan:
        for case in comparison.cases:
            # A few tokens of the first requests: buffers, adapters, code paths.
            workload, folders = comparison.task(case, adapters)
            requests = tuple(
                replace(r, output_tokens=min(2, r.output_tokens), arrival=0.0)
                for r in workload.requests[:64]
            )
            engines[case.engine].run(replace(workload, requests=requests), folders)
    total = most * sum(len(c.cases) for c in plan)
    with tqdm(total=total, unit="run", disable=None) as bar:  # on a terminal
        for repeat in repeats:
            for comparison in plan:
                for case in comparison.cases if repeat % 2 == 0 else comparison.cases[::-1]:
                    workload, folders = comparison.task(case, adapters)
                    name = f"{workload.name}: {case.label}"
                    bar.set_description(name)
                    timings = engines[case.engine].run(workload, folders)
                    speed = recorder.measured(
                        workload,
                        timings,
                        family=comparison.family,
                        x=comparison.x,
                        kind=case.kind,
                        mode=case.mode,
                        tenants=case.tenants,
                        repeat=repeat,
                    )
                    bar.update()
                    if bar.disable:
                        say(f"{name}: {speed:.1f} tokens/s")
