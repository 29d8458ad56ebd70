"""The command line of `vllm-pedro bench`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from .arguments import count, find_model, positive
from .offline import ENGINES, FAMILIES, QUICK, Options, Sizes, comparisons, default_engines, run
from .report import check_plots, finish, write_report
from .results import Recorder, load_average, read_results, say

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
    _add_common(parser, "pedro-bench-quick", QUICK_MINUTES, 5)
    parser.set_defaults(run=run_quick)
    return parser


def _add_common(parser: argparse.ArgumentParser, output: str, minutes: float, repeats: int) -> None:
    parser.add_argument(
        "--model", metavar="FOLDER", help="a model's folder; default: SmolLM2-135M, fetched"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path(output),
        help="results.jsonl, report.md and plots go here (%(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        default=minutes,
        metavar="M",
        help="start no repeat that would end later than this (%(default)g)",
    )
    parser.add_argument(
        "--repeats", type=count, default=repeats, metavar="N", help="at most (%(default)s)"
    )
    parser.add_argument("--dtype", default="bfloat16", help="(%(default)s)")
    parser.add_argument("--no-plots", action="store_true", help="write no PNGs")


def offline_parser() -> argparse.ArgumentParser:
    sizes = Sizes()
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} offline",
        description="Measure engines without a server. All are alive at once and take turns.",
        allow_abbrev=False,
    )
    _add_common(parser, "pedro-bench", 60.0, 3)
    parser.add_argument(
        "--workloads",
        nargs="+",
        choices=FAMILIES,
        default=["decode", "prefill", "mixed", "paper"],
        metavar="NAME",
        help=f"of {', '.join(FAMILIES)} (decode prefill mixed paper)",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES,
        metavar="NAME",
        help=f"of {', '.join(ENGINES)}; default: those that this build of vLLM can run",
    )
    parser.add_argument("--rows", type=count, default=sizes.rows, help="at once (%(default)s)")
    parser.add_argument("--prompt-tokens", type=count, default=sizes.prompt_tokens, metavar="N")
    parser.add_argument("--output-tokens", type=count, default=sizes.output_tokens, metavar="N")
    parser.add_argument("--max-model-len", type=count, default=sizes.max_model_len, metavar="N")
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
        default=sizes.lora_tenants,
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
        "--slots",
        type=count,
        metavar="N",
        help="adapters on the device at once, PEDRO's and LoRA's (tenants + 1, at most 33)",
    )
    parser.add_argument(
        "--concurrency", nargs="+", type=count, default=list(sizes.concurrencies), metavar="N"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        type=count,
        default=list(sizes.prompts),
        metavar="N",
        help="prompt lengths of the break-even workload",
    )
    parser.add_argument("--static", action="store_true", help="measure (IA)3 vectors too")
    parser.add_argument("--trace", metavar="FILE", help="Azure 2023 CSV, or .gz")
    parser.add_argument("--trace-requests", type=count, default=sizes.trace_count, metavar="N")
    parser.add_argument(
        "--trace-speed", type=positive, default=1.0, metavar="X", help="times as fast"
    )
    parser.add_argument(
        "--trace-shrink", type=positive, default=1.0, metavar="X", help="divide lengths by this"
    )
    parser.add_argument(
        "--kv-cache-mib", type=count, default=512, metavar="N", help="of each engine (%(default)s)"
    )
    parser.set_defaults(run=run_offline)
    return parser


def serving_parser() -> argparse.ArgumentParser:
    from .serving import add_arguments, run_serving

    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} serving",
        description="Start base, PEDRO and LoRA servers in turns, and send each the same requests "
        "with vLLM's own client, 'vllm bench serve'.",
        allow_abbrev=False,
    )
    _add_common(parser, "pedro-bench-serving", 60.0, 3)
    add_arguments(parser)
    parser.set_defaults(run=run_serving)
    return parser


def report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} report",
        description="Write report.md and plots from result files, without measuring anything.",
        allow_abbrev=False,
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results.jsonl of a run")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path("pedro-bench"))
    parser.add_argument("--no-plots", action="store_true", help="write no PNGs")
    parser.set_defaults(run=run_report)
    return parser


# Commands ----------------------------------------------------------------------------------------


def run_quick(args: argparse.Namespace, argv: list[str]) -> int:
    """A decode-heavy batch and a small break-even."""
    return _run(args, argv, ["decode", "break-even"], default_engines(), QUICK, None, 256)


def run_offline(args: argparse.Namespace, argv: list[str]) -> int:
    rows = args.rows
    sizes = Sizes(
        rows=rows,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        tenants=tuple(sorted(set(args.tenants or (1, rows, *Sizes.tenants[1:])))),
        lora_tenants=args.eager_tenants,
        tenant_tokens=tuple(args.tenant_tokens) if args.tenant_tokens else None,
        concurrencies=tuple(args.concurrency),
        prompts=tuple(args.prompts),
        max_model_len=args.max_model_len,
        trace=args.trace,
        trace_count=args.trace_requests,
        trace_speed=args.trace_speed,
        trace_shrink=args.trace_shrink,
    )
    engines = args.engines or default_engines()
    return _run(
        args, argv, args.workloads, engines, sizes, args.slots, args.kv_cache_mib, args.static
    )


def _run(
    args: argparse.Namespace,
    argv: list[str],
    workloads: Sequence[str],
    engines: Sequence[str],
    sizes: Sizes,
    slots: int | None,
    kv_mib: int,
    static: bool = False,
) -> int:
    started = time.monotonic()
    plan = comparisons(workloads, engines, sizes, static)
    if not args.no_plots:
        check_plots()
    model = find_model(args.model)
    recorder = Recorder(args.output / "results.jsonl")
    recorder.begin(argv, repeats=args.repeats, minutes=args.minutes)
    _warn_if_busy()
    options = Options(model, args.dtype, args.repeats, args.minutes, slots, kv_mib << 20)
    try:
        run(plan, options, recorder)
    finally:
        recorder.end()
    finish(recorder, args.output, not args.no_plots, time.monotonic() - started)
    return 0


def _warn_if_busy() -> None:
    load = load_average()
    if load and load[0] > 0.5:
        say(
            f"the load average is {load[0]:.1f}: other programs use this machine, and the figures "
            "will show it"
        )


def run_report(args: argparse.Namespace, argv: list[str]) -> int:
    paths = write_report(read_results(args.results), args.output, not args.no_plots)
    print("\n".join(map(str, paths)))
    return 0
