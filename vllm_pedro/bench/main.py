"""The command line of `vllm-pedro bench`."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ..backbone import check_model_folder
from . import offline, serving
from .cases import ENGINES
from .plots import check_plots
from .report import short_report, write_report
from .results import Recorder, load_average, read_results, repeats_in_time, say
from .workloads import MIXES

QUICK: Final = (
    "offline --output pedro-bench-quick --minutes 8 --repeats 5 --workloads decode break-even "
    "--prompt-tokens 64 --output-tokens 32 --tenants 1 16 --prompts 32 256 --max-model-len 280 "
    "--kv-cache-mib 256"
)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark.

    Raises:
        PedroError: Something that the user can put right.
    """
    words = list(argv)
    if "--quick" in words:
        words.remove("--quick")
        words = [*QUICK.split(), *words]
    args = make_parser().parse_args(words)
    if args.command == "report":
        paths = write_report(read_results(args.results), args.output, not args.no_plots)
        print("\n".join(map(str, paths)))
        return 0
    return _measure(args, argv)


# Options -----------------------------------------------------------------------------------------


def _count(text: str) -> int:
    """A whole number from 1 to a million."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def _positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """Of all commands."""
    parser = argparse.ArgumentParser(
        prog="vllm-pedro bench",
        description="Measure the backbone, PEDRO and vLLM's own LoRA in one run, in turns.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="in place of a command: a first comparison, under 10 minutes on 2 CPU cores; "
        "takes the options of 'offline'",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, what: str, output: str, holds: str) -> argparse.ArgumentParser:
        own = commands.add_parser(
            name,
            help=what,
            description=what,
            allow_abbrev=False,
        )
        holds = f"{holds} go here (%(default)s)"
        own.add_argument("--output", metavar="FOLDER", type=Path, default=output, help=holds)
        own.add_argument("--no-plots", action="store_true", help="write no PNGs")
        return own

    what = "engines without a server; all are alive at once and take turns"
    own = command("offline", what, "pedro-bench", "results.jsonl, report.md and plots")
    _add_run(own, "--engines")
    own.add_argument(
        "--workloads",
        nargs="+",
        choices=offline.FAMILIES,
        default=["decode", "prefill", "mixed", "paper"],
        metavar="NAME",
        help=f"of {', '.join(offline.FAMILIES)} (decode prefill mixed paper)",
    )
    _add_counts(own, {"--rows": [16]}, "sequences at once; of most workloads, each", nargs="+")
    _add_counts(own, {"--prompt-tokens": 128, "--output-tokens": 64})
    own.add_argument(
        "--tenants",
        nargs="+",
        type=_count,
        metavar="N",
        help="numbers of tenants, up to 10,000 (1, ROWS; of 'tenants' 8, 32, 128 too)",
    )
    own.add_argument(
        "--tenant-tokens",
        nargs=2,
        type=_count,
        metavar=("PROMPT", "OUTPUT"),
        help="of 'tenants' (32 16; above 256 tenants 16 8, above 2,048 8 2)",
    )
    _add_counts(own, {"--concurrency": [1, 4, 16]}, nargs="+")
    _add_counts(own, {"--prompts": [32, 128, 512]}, "lengths for 'break-even'", nargs="+")
    own.add_argument("--static", action="store_true", help="measure (IA)3 vectors too")
    own.add_argument(
        "--llm",
        type=json.loads,
        default={},
        metavar="JSON",
        help="further keywords of `LLM`; those with 'pedro' or 'lora' in their names are for such "
        "engines alone",
    )

    what = "base, PEDRO and LoRA servers in turns, and vLLM's own client, 'vllm bench serve'"
    own = command("serving", what, "pedro-bench-serving", "results.jsonl, report.md and plots")
    _add_run(own, "--servers")
    _add_counts(own, {"--tenants": 8, "--requests": 64, "--prompt-tokens": 128})
    _add_counts(own, {"--output-tokens": 32, "--max-num-seqs": 32})
    own.add_argument(
        "--mix", choices=MIXES, default="uniform", help="who asks how often (%(default)s)"
    )
    what = "a closed loop of so many requests for each"
    _add_counts(own, {"--concurrency": [16]}, what, nargs="*")
    own.add_argument(
        "--rate",
        nargs="*",
        type=_positive,
        default=[],
        metavar="R",
        help="Poisson arrivals of so many requests a second, for each",
    )

    what = "report.md and plots from result files, without measuring anything"
    own = command("report", what, "pedro-bench", "report.md and plots")
    own.add_argument("results", nargs="+", metavar="RESULTS", help="results.jsonl of a run")
    return parser


def _add_counts(
    parser: argparse.ArgumentParser, defaults: dict[str, Any], what: str = "", **keywords: Any
) -> None:
    for option, default in defaults.items():
        keywords["help"] = f"{what} (%(default)s)".strip()
        parser.add_argument(option, type=_count, default=default, metavar="N", **keywords)


def _add_run(parser: argparse.ArgumentParser, engines: str) -> None:
    """The options of both commands that measure."""
    parser.add_argument("--model", metavar="FOLDER", help="default: SmolLM2-135M, fetched")
    parser.add_argument(
        "--minutes",
        type=_positive,
        default=60.0,
        metavar="M",
        help="start no repeat that would end later than this (%(default)g)",
    )
    _add_counts(parser, {"--repeats": 3}, "at most")
    parser.add_argument(
        "--dtype", help="default: bfloat16, or float32 on a CPU that only emulates bfloat16"
    )
    parser.add_argument(
        engines,
        dest="engines",
        nargs="+",
        choices=ENGINES,
        metavar="NAME",
        help=f"of {', '.join(ENGINES)}; default: those that this build of vLLM can run",
    )
    _add_counts(parser, {"--max-model-len": 1024})
    _add_counts(parser, {"--kv-cache-mib": 512}, "of each engine")
    parser.add_argument("--trace", metavar="FILE", help="replay it: Azure 2023 CSV, or .gz")
    for option, what in (("speed", "times as fast"), ("shrink", "divide lengths by this")):
        parser.add_argument(
            f"--trace-{option}", type=_positive, default=1.0, metavar="X", help=what
        )


# The run -----------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measure, and what stands around that: checks before, records, the report after."""
    started = time.monotonic()
    module: Any = {"offline": offline, "serving": serving}[args.command]
    plan = module.plan(args)
    if not args.no_plots:
        check_plots()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.model is None:
        from ..fetch import fetch_model

        args.model = str(fetch_model())
    check_model_folder(args.model)
    if args.dtype is None:
        from ..integration.llm import fast_dtype

        args.dtype = "float32" if fast_dtype() == "float32" else "bfloat16"
    recorder = Recorder(args.output / "results.jsonl")
    recorder.begin(argv, repeats=args.repeats, minutes=args.minutes)
    load = load_average()[0]
    if load > 0.5:
        say(
            f"the load average is {load:.1f}: other programs use this machine, and the figures "
            "will show it"
        )
    try:
        repeats = repeats_in_time(args.repeats, started + 60 * args.minutes)
        module.run(args, plan, recorder, repeats)
    finally:
        recorder.end()
    paths = write_report(recorder.records, args.output, not args.no_plots)
    print(short_report(recorder.records))
    minutes = (time.monotonic() - started) / 60
    print(f"{minutes:.1f} minutes. In {args.output}: " + ", ".join(p.name for p in paths))
    return 0
