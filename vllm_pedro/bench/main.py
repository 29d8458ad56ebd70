"""The command line of `vllm-pedro bench`."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Final

from . import offline, serving
from .arguments import add_engines, add_output, add_run, count, find_model, positive
from .cases import default_engines
from .offline import FAMILIES, QUICK, Comparison, Options, Sizes, comparisons
from .plots import check_plots
from .report import finish, write_report
from .results import Recorder, load_average, read_results, repeats_in_time, say
from .workloads import MIXES

PROGRAM: Final = "vllm-pedro bench"
COMMANDS: Final = {
    "offline": "engines in this machine's memory, without a server; all workloads",
    "serving": "servers, and vLLM's own client 'vllm bench serve'",
    "report": "write report.md and plots from result files again",
}
QUICK_MINUTES: Final = 8.0


def main(argv: Sequence[str]) -> int:
    """Run the benchmark.

    Raises:
        PedroError: Something that the user can put right.
    """
    if argv and argv[0] in COMMANDS:
        parsers: dict[str, Callable[[], argparse.ArgumentParser]] = {
            "offline": offline_parser,
            "serving": serving_parser,
            "report": report_parser,
        }
        args = parsers[argv[0]]().parse_args(argv[1:])
    else:
        parser = quick_parser()
        args = parser.parse_args(argv)
        if not args.quick:
            parser.error(f"expected --quick or one of {', '.join(COMMANDS)}")
    return int(args.run(args, list(argv)))


# Parsers -----------------------------------------------------------------------------------------


def quick_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{what}" for name, what in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measure the backbone, PEDRO and vLLM's own LoRA in one run, in turns.",
        epilog="commands, each with its own --help:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick", action="store_true", help="a first comparison; under 10 minutes on 2 CPU cores"
    )
    add_run(parser, "pedro-bench-quick", QUICK_MINUTES, 5)
    parser.set_defaults(run=run_quick)
    return parser


def offline_parser() -> argparse.ArgumentParser:
    sizes = Sizes()
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} offline",
        description="Measure engines without a server. All are alive at once and take turns.",
        allow_abbrev=False,
    )
    add_run(parser, "pedro-bench", 60.0, 3)
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=FAMILIES,
        default=["decode", "prefill", "mixed", "paper"],
        metavar="NAME",
        help=f"of {', '.join(FAMILIES)} (decode prefill mixed paper)",
    )
    add_engines(parser, "--engines")
    parser.add_argument("--rows", type=count, default=sizes.rows, help="at once (%(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=sizes.prompt_tokens, metavar="N")
    parser.add_argument("--output-tokens", type=count, default=sizes.output_tokens, metavar="N")
    parser.add_argument(
        "--tenants",
        nargs="+",
        type=count,
        metavar="N",
        help="numbers of tenants, up to 10,000 "
        f"(1, ROWS, {', '.join(map(str, sizes.tenants[1:]))})",
    )
    parser.add_argument(
        "--eager-tenants",
        type=count,
        default=sizes.eager_tenants,
        metavar="N",
        help="with more tenants only compiled engines are measured, as eager ones take too long "
        "(%(default)s)",
    )
    parser.add_argument(
        "--tenant-tokens",
        nargs=2,
        type=count,
        metavar=("PROMPT", "OUTPUT"),
        help="lengths of the workload 'tenants' (32 16; above 256 tenants 16 8, above 2,048 8 2)",
    )
    parser.add_argument(
        "--concurrency", nargs="+", type=count, default=sizes.concurrency, metavar="N"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=count,
        default=sizes.prompts,
        metavar="N",
        help="prompt lengths of the break-even workload",
    )
    parser.add_argument("--static", action="store_true", help="measure (IA)3 vectors too")
    parser.add_argument("--trace-requests", type=count, default=sizes.trace_requests, metavar="N")
    parser.set_defaults(run=run_offline)
    return parser


def serving_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} serving",
        description="Start base, PEDRO and LoRA servers in turns, and send each the same requests "
        "with vLLM's own client, 'vllm bench serve'.",
        allow_abbrev=False,
    )
    add_run(parser, "pedro-bench-serving", 60.0, 3)
    add_engines(parser, "--servers")
    parser.add_argument("--tenants", type=count, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--mix", choices=MIXES, default="uniform", help="(%(default)s)")
    parser.add_argument("--requests", type=count, default=64, metavar="N", help="(%(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=128, metavar="N")
    parser.add_argument("--output-tokens", type=count, default=32, metavar="N")
    parser.add_argument(
        "--concurrency",
        nargs="*",
        type=count,
        default=[16],
        metavar="N",
        help="a closed loop of so many requests for each (%(default)s)",
    )
    parser.add_argument(
        "--rate",
        nargs="*",
        type=positive,
        default=[],
        metavar="R",
        help="Poisson arrivals of so many requests a second, for each",
    )
    parser.add_argument("--max-num-seqs", type=count, default=32, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run_serving)
    return parser


def report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} report",
        description="Write report.md and plots from result files, without measuring anything.",
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results.jsonl of a run")
    add_output(parser, "pedro-bench", "report.md and plots")
    parser.set_defaults(run=run_report)
    return parser


# Commands ----------------------------------------------------------------------------------------


def run_quick(args: argparse.Namespace, argv: list[str]) -> int:
    """A decode-heavy batch and a small break-even."""
    plan = comparisons(["decode", "break-even"], default_engines(), QUICK)
    return _measure_offline(args, argv, plan, None, 256)


def run_offline(args: argparse.Namespace, argv: list[str]) -> int:
    args.tenants = sorted(set(args.tenants or (1, args.rows, *Sizes.tenants[1:])))
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes)})
    plan = comparisons(args.workloads, args.engines or default_engines(), sizes, args.static)
    return _measure_offline(args, argv, plan, args.slots, args.kv_cache_mib)


def _measure_offline(
    args: argparse.Namespace,
    argv: list[str],
    plan: Sequence[Comparison],
    slots: int | None,
    kv_mib: int,
) -> int:
    def measure(model: str, recorder: Recorder, repeats: Iterable[int]) -> None:
        options = Options(model, args.dtype, args.repeats, slots, kv_mib << 20)
        offline.run(plan, options, recorder, repeats)

    return _run(args, argv, measure)


def run_serving(args: argparse.Namespace, argv: list[str]) -> int:
    plan = serving.workloads(args)
    return _run(args, argv, functools.partial(serving.run, args, plan))


def _run(
    args: argparse.Namespace,
    argv: list[str],
    measure: Callable[[str, Recorder, Iterable[int]], None],
) -> int:
    """Measure, and what stands around that: checks before, records, the report after."""
    started = time.monotonic()
    if not args.no_plots:
        check_plots()
    model = find_model(args.model)
    if args.dtype is None:
        from ..integration.llm import fast_dtype

        args.dtype = "float32" if fast_dtype() == "float32" else "bfloat16"
    recorder = Recorder(args.output / "results.jsonl")
    recorder.begin(argv, repeats=args.repeats, minutes=args.minutes)
    load = load_average()
    if load and load[0] > 0.5:
        say(
            f"the load average is {load[0]:.1f}: other programs use this machine, and the figures "
            "will show it"
        )
    try:
        measure(model, recorder, repeats_in_time(args.repeats, started + 60 * args.minutes))
    finally:
        recorder.end()
    finish(recorder, args.output, not args.no_plots, time.monotonic() - started)
    return 0


def run_report(args: argparse.Namespace, argv: list[str]) -> int:
    paths = write_report(read_results(args.results), args.output, not args.no_plots)
    print("\n".join(map(str, paths)))
    return 0
