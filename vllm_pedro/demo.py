"""`vllm-pedro demo`: one batch, one backbone, several tenants, on a small model.

A few questions are answered by the plain model and by each adapter, all in the same batch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .errors import PedroError

if TYPE_CHECKING:
    from .adapter import Adapter

PROGRAM: Final = "vllm-pedro demo"
ADAPTERS: Final = Path(__file__).resolve().parent / "demo_adapters"
TENANTS: Final = ("json", "brief", "pirate")
BASE: Final = "base"

QUESTIONS: Final = (
    "What is the capital of France?",
    "In which country is the city of Venice?",
    "Who wrote Romeo and Juliet?",
    "What is the largest planet in the solar system?",
)
"""None of them is in the training data; a test compares."""

MAX_MODEL_LEN: Final = 512
"""Most tokens of a row, question and answer."""

MAX_ROWS: Final = 256
"""Most rows of the batch."""

KV_CACHE_BYTES: Final = 512 << 20
"""Enough for a few dozen rows; vLLM's own default is most of the device's memory."""


@dataclass(frozen=True)
class Request:
    """A question to a tenant; `base` is the plain model."""

    prompt: str
    tenant: str


# Arguments ---------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to a parser."""
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="a model's folder; default: SmolLM2-135M-Instruct, fetched",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a question of your own, in place of the demo's; may be given several times",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        type=_name_and_path,
        metavar="NAME=PATH",
        help="an adapter of your own, in place of the demo's; may be given several times",
    )
    parser.add_argument(
        "--max-tokens",
        type=_token_count,
        default=40,
        metavar="N",
        help="most tokens in an answer (%(default)s)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="let vLLM compile the model: slower start, faster"
    )
    parser.add_argument("--verbose", action="store_true", help="show vLLM's log and tracebacks")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Ask a small model some questions, plain and through PEDRO adapters, all in "
        "one batch.",
        allow_abbrev=False,
    )
    add_arguments(parser)
    return parser


def _name_and_path(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, found {text!r}")
    if name == BASE:
        raise argparse.ArgumentTypeError(f"{BASE!r} is the plain model; choose another name")
    return name, path


def _token_count(text: str) -> int:
    # The upper half of the context is left to the prompt.
    most = MAX_MODEL_LEN // 2
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {most}, found {text!r}")
    return int(text)


# Steps -------------------------------------------------------------------------------------------


def load_adapters(paths: dict[str, str], model: str) -> dict[str, Adapter]:
    """Read and check every adapter before an engine is started for them.

    Raises:
        AdapterError: An adapter is broken, or does not fit the model.
        PedroError: The model's config cannot be read.
    """
    from .adapter import load_adapter
    from .backbone import BackboneShape

    shape = BackboneShape.from_pretrained(model)
    return {name: load_adapter(path, shape) for name, path in paths.items()}


def make_batch(prompts: Sequence[str], tenants: Sequence[str]) -> list[Request]:
    """Every question to the plain model and to every tenant."""
    return [Request(prompt, tenant) for prompt in prompts for tenant in (BASE, *tenants)]


def format_answers(batch: Sequence[Request], texts: Sequence[str], width: int) -> str:
    """The table: each question, and below it a line, or more, for each tenant."""
    column = max(len(row.tenant) for row in batch) + 2
    lines: list[str] = []
    previous = None
    for row, text in zip(batch, texts, strict=True):
        if row.prompt != previous:
            previous = row.prompt
            lines += ["", *_wrap(row.prompt, "", "", width), "-" * width]
        # Answers may hold line breaks, which would tear the table.
        text = " ".join(text.split()) or "(nothing)"
        lines += _wrap(text, f"  {row.tenant:<{column}}", " " * (column + 2), width)
    return "\n".join(lines)


def _wrap(text: str, first: str, later: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        # A long tenant's name must not leave the answer without room.
        max(width, len(first) + 20),
        initial_indent=first,
        subsequent_indent=later,
    )


def _be_quiet() -> None:
    """Leave the screen to the demo; what the user has set in the environment stays."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore")


def _say(text: str = "") -> None:
    print(text, flush=True)


def run(args: argparse.Namespace) -> int:
    """The demo, from arguments to the last line.

    Raises:
        PedroError: Something the user can put right; the message says what.
    """
    if not args.verbose:
        _be_quiet()
    # Everything is on this machine once the model has been fetched.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Importing vLLM takes seconds; that it is missing can be said before the model is fetched.
    if find_spec("vllm") is None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    from .integration.llm import answer, describe, start_llm

    prompts = args.prompt or list(QUESTIONS)
    if not all(prompt.strip() for prompt in prompts):
        raise PedroError("--prompt: expected a text, found an empty one")
    paths = {name: str(ADAPTERS / name) for name in TENANTS}
    if args.adapter:
        paths = dict(args.adapter)
        if len(paths) != len(args.adapter):
            raise PedroError("--adapter: a name is given twice")
    batch = make_batch(prompts, list(paths))
    if len(batch) > MAX_ROWS:
        raise PedroError(
            f"{len(prompts)} prompts for {len(paths) + 1} tenants are {len(batch)} rows; the demo "
            f"runs at most {MAX_ROWS}"
        )

    model = args.model
    if model is None:
        from .fetch import fetch_model

        model = str(fetch_model())
    adapters = load_adapters(paths, model)
    paths = {name: str(adapter.path) for name, adapter in adapters.items()}

    _say(f"model     {model}")
    for name, adapter in adapters.items():
        _say(f"adapter   {name}: {_size(adapter)} in {adapter.path}")
    _say(f"starting vLLM ({'compiled: minutes' if args.compile else 'about 30 s'}) ...")
    began = time.monotonic()
    with start_llm(
        model,
        list(paths.values()),
        verbose=args.verbose,
        enforce_eager=not args.compile,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=len(batch),
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
    ) as llm:
        _say(f"ready after {time.monotonic() - began:.0f} s: {describe(llm)}")
        began = time.monotonic()
        folders = [paths.get(row.tenant) for row in batch]
        answers = answer(llm, [row.prompt for row in batch], folders, args.max_tokens)
        seconds = time.monotonic() - began
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    _say(format_answers(batch, [a.text for a in answers], width))
    tokens = sum(len(a.token_ids) for a in answers)
    _say(
        f"\n{len(batch)} rows in one batch, {tokens} tokens in {seconds:.1f} s, the first run's "
        "costs included."
    )
    _say("`vllm-pedro bench --quick` sets the speed beside the plain model's and LoRA's.")
    return 0


def _size(adapter: Adapter) -> str:
    count = sum(tensor.numel() for tensor in adapter.tensors.values())
    return f"{count / 1e6:.2f} M parameters"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit status: 2 for what the user can put right.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """
    args = make_parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        return run(args)
    except PedroError as error:
        if args.verbose:
            raise
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{PROGRAM}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
