"""What the commands of `vllm-pedro bench` read from their arguments."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import PedroError
from .cases import ENGINES


def count(text: str) -> int:
    """A whole number from 1 to a million."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def add_output(parser: argparse.ArgumentParser, folder: str, what: str) -> None:
    """Where a report, or `what` else a command writes, goes."""
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path(folder),
        help=f"{what} go here (%(default)s)",
    )
    parser.add_argument("--no-plots", action="store_true", help="write no PNGs")


def add_run(parser: argparse.ArgumentParser, folder: str, minutes: float, repeats: int) -> None:
    """The options of all commands that measure."""
    parser.add_argument(
        "--model", metavar="FOLDER", help="a model's folder; default: SmolLM2-135M, fetched"
    )
    add_output(parser, folder, "results.jsonl, report.md and plots")
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
    parser.add_argument(
        "--dtype", help="default: bfloat16, or float32 on a CPU that only emulates bfloat16"
    )


def add_engines(parser: argparse.ArgumentParser, option: str) -> None:
    """The options about engines, in a server or without one, and about traces."""
    parser.add_argument(
        option,
        nargs="+",
        choices=ENGINES,
        metavar="NAME",
        help=f"of {', '.join(ENGINES)}; default: those that this build of vLLM can run",
    )
    parser.add_argument("--max-model-len", type=count, default=1024, metavar="N")
    parser.add_argument(
        "--slots",
        type=count,
        metavar="N",
        help="adapters on the device at once, PEDRO's and LoRA's (tenants + 1, at most 33)",
    )
    parser.add_argument(
        "--kv-cache-mib", type=count, default=512, metavar="N", help="of each engine (%(default)s)"
    )
    parser.add_argument("--trace", metavar="FILE", help="replay it: Azure 2023 CSV, or .gz")
    parser.add_argument(
        "--trace-speed", type=positive, default=1.0, metavar="X", help="times as fast"
    )
    parser.add_argument(
        "--trace-shrink", type=positive, default=1.0, metavar="X", help="divide lengths by this"
    )


def find_model(model: str | None) -> str:
    """The model's folder; the demo's model if none is named."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if model is not None:
        if not Path(model, "config.json").is_file():
            raise PedroError(f"{model}: expected a model's folder with a config.json")
        return model
    from ..fetch import fetch_model

    return str(fetch_model(progress=True))
