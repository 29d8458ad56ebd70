"""The command `vllm-pedro`. Nothing heavy is imported before a subcommand needs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from .. import __version__
from ..errors import PedroError
from . import adapter, distill, train

PROGRAM = "vllm-pedro"

# Their arguments belong to another parser, which answers --help too.
HANDED_ON = {
    "bench": "vllm_pedro.bench.main",
    "demo": "vllm_pedro.demo",
    "serve": "vllm_pedro.integration.serve",
    "verify": "vllm_pedro.integration.verify",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="PEDRO adapters: make them, look at them, serve them with vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser(
        "bench", help="measure base, PEDRO and LoRA side by side (--quick)", add_help=False
    )
    commands.add_parser("demo", help="see adapters at work on a small model", add_help=False)
    commands.add_parser(
        "serve",
        help="an OpenAI-compatible server: 'vllm serve' with its arguments and PEDRO's",
        add_help=False,
    )

    commands.add_parser(
        "verify", help="check that PEDRO works with the vLLM and device at hand", add_help=False
    )

    fetch = commands.add_parser(
        "fetch-model",
        help="download the small model that the demo uses",
        description="Download and convert SmolLM2-135M-Instruct (93 MB; 270 MB on disk) unless it "
        "is in the cache. Prints its folder as the last line.",
    )
    fetch.add_argument("--cache", metavar="FOLDER", help="in place of $VLLM_PEDRO_CACHE")
    fetch.add_argument("--verify", action="store_true", help="check the contents of every file")
    fetch.add_argument("--quiet", action="store_true", help="print only the folder")
    fetch.set_defaults(run=run_fetch_model)

    adapter.add_parsers(commands)
    train.add_parsers(commands)
    distill.add_parser(commands)
    return parser


def run_fetch_model(args: argparse.Namespace) -> int:
    from ..fetch import fetch_model

    print(fetch_model(args.cache, progress=not args.quiet, verify=args.verify))
    return 0


def hand_on(command: str, argv: Sequence[str]) -> int:
    """Run a subcommand that reads its own arguments."""
    run: Callable[[Sequence[str]], int | None] = importlib.import_module(HANDED_ON[command]).main
    try:
        return run(argv) or 0
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise PedroError(
            f"{command} needs vLLM: pip install 'vllm-pedro[cuda]' on NVIDIA, "
            "'vllm-pedro[cpu]' elsewhere"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit status: 2 for what the user can put right."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in HANDED_ON:
            return hand_on(argv[0], argv[1:])
        if argv and argv[0] == "train":
            return train.main_train(make_parser(), argv)
        if argv and argv[0] == "distill":
            return distill.main(make_parser(), argv)
        args = make_parser().parse_args(argv)
        return int(args.run(args))
    except PedroError as error:
        # One line, whatever is in a message that came from elsewhere.
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
