"""``vllm-pedro demo``: one batch, one backbone, several tenants, on a small model.

A few questions are answered by the plain model and by each adapter, all in the same batch, and the
speed of that batch is set beside the speed of the same batch without adapters. What needs vLLM is
in `integration/demo.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from .errors import PedroError

if TYPE_CHECKING:
    from .adapter import Adapter

PROGRAM: Final = "vllm-pedro demo"
ADAPTERS: Final = Path(__file__).resolve().parent / "demo_adapters"
TENANTS: Final = ("json", "brief", "pirate")
BASE: Final = "base"

# None of them is in the training data; a test compares.
QUESTIONS: Final = (
    "What is the capital of France?",
    "In which country is the city of Venice?",
    "Who wrote Romeo and Juliet?",
    "What is the largest planet in the solar system?",
)

MAX_MODEL_LEN: Final = 512
MAX_ROWS: Final = 256
ROUNDS: Final = 5
MEASURE_SECONDS: Final = 60.0  # on a machine too slow or too busy for all rounds, fewer have to do
NOISY: Final = 1.3  # fastest round over slowest, above which the figures are not to be trusted


@dataclass(frozen=True)
class Request:
    """A question to a tenant; `base` is the plain model."""

    prompt: str
    tenant: str


@dataclass(frozen=True)
class Answer:
    """What came back: the text, and how many tokens were generated."""

    text: str
    tokens: int


class Engine(Protocol):
    """What the demo needs of vLLM."""

    description: str

    def generate(
        self, batch: Sequence[Request], max_tokens: int, ignore_eos: bool = False
    ) -> list[Answer]:
        """Answer a batch greedily, in its order."""


@dataclass(frozen=True)
class EngineSettings:
    """How to start vLLM.

    Attributes:
        model: the model's folder.
        adapters: tenant name to adapter.
        rows: rows of the batch, all of which are to run at once.
        max_tokens: most tokens a row generates.
        compile: let vLLM compile the model.
        verbose: leave vLLM's logging as it is.
    """

    model: str
    adapters: dict[str, Adapter]
    rows: int
    max_tokens: int
    compile: bool
    verbose: bool


@dataclass(frozen=True)
class Speed:
    """Generated tokens a second of the batch with adapters and without, one entry a round."""

    rows: int
    tokens_a_row: int
    mixed: list[float]
    plain: list[float]

    @property
    def mixed_median(self) -> float:
        return statistics.median(self.mixed)

    @property
    def plain_median(self) -> float:
        return statistics.median(self.plain)

    @property
    def ratio(self) -> float:
        """Median of the ratios of neighbours, so that a machine's slow drift falls out."""
        return statistics.median(m / p for m, p in zip(self.mixed, self.plain, strict=True))


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
    parser.add_argument("--json", metavar="FILE", help="write answers and speed to this file too")
    parser.add_argument("--verbose", action="store_true", help="show vLLM's log and tracebacks")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Ask a small model some questions, plain and through PEDRO adapters, all in "
        "one batch, and compare the speed with the same batch without adapters.",
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
        AdapterError: an adapter is broken, or does not fit the model.
        PedroError: the model's config cannot be read.
    """
    from transformers import AutoConfig

    from .adapter import load_adapter
    from .backbone import BackboneShape

    if not Path(model, "config.json").is_file():
        raise PedroError(f"{model}: expected a model's folder with a config.json")
    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise PedroError(f"{model}: cannot read its config.json: {first_line(error)}") from error
    shape = BackboneShape.from_hf_config(config)
    return {name: load_adapter(path, shape) for name, path in paths.items()}


def make_batch(prompts: Sequence[str], tenants: Sequence[str]) -> list[Request]:
    """Every question to the plain model and to every tenant."""
    return [Request(prompt, tenant) for prompt in prompts for tenant in (BASE, *tenants)]


def measure(
    engine: Engine,
    batch: Sequence[Request],
    max_tokens: int,
    rounds: int = ROUNDS,
    budget: float = MEASURE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], None] = lambda text: None,
) -> Speed:
    """Time the batch against the same prompts without adapters, in turns.

    Args:
        engine: the engine.
        batch: the batch with adapters.
        max_tokens: how many tokens each row generates.
        rounds: how often each of the two is timed, at most.
        budget: seconds after which no further round begins; one always runs.
        clock: seconds.
        say: is told, after the warm-up, how long the rest will take.
    """
    plain_batch = [Request(row.prompt, BASE) for row in batch]
    batches = {"mixed": list(batch), "plain": plain_batch}
    rates: dict[str, list[float]] = {"mixed": [], "plain": []}
    for name in batches:  # warm-up; the second is the one without first-time costs
        began = clock()
        engine.generate(batches[name], max_tokens, ignore_eos=True)
    one = 2 * (clock() - began)
    fitting = min(rounds, max(1, math.ceil(budget / one))) if one > 0 else rounds
    say(
        f"measuring: {fitting} round{'s' if fitting != 1 else ''} with adapters, as many without, "
        f"about {fitting * one:.0f} s ..."
    )
    started = clock()
    for index in range(rounds):
        if index and clock() - started > budget:
            break
        # Neither is always the one that runs first.
        for name in ("mixed", "plain") if index % 2 == 0 else ("plain", "mixed"):
            began = clock()
            answers = engine.generate(batches[name], max_tokens, ignore_eos=True)
            seconds = clock() - began
            rates[name].append(sum(answer.tokens for answer in answers) / seconds)
    return Speed(len(batch), max_tokens, rates["mixed"], rates["plain"])


def format_answers(batch: Sequence[Request], answers: Sequence[Answer], width: int) -> str:
    """The table: each question, and below it a line, or more, for each tenant."""
    column = max(len(row.tenant) for row in batch) + 2
    lines: list[str] = []
    previous = None
    for row, answer in zip(batch, answers, strict=True):
        if row.prompt != previous:
            previous = row.prompt
            lines += ["", *_wrap(row.prompt, "", "", width), "-" * width]
        # Answers may hold line breaks, which would tear the table.
        text = " ".join(answer.text.split()) or "(nothing)"
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


def format_speed(speed: Speed, tenants: int, description: str, width: int) -> str:
    """The figures, and what was measured."""
    note = (
        f"Generated tokens per second, prompts included in the time: {speed.rows} rows, "
        f"{speed.tokens_a_row} tokens each, greedy, the end of an answer ignored, no prefix cache, "
        f"{description}. Warmed up, then {len(speed.mixed)} rounds of each in turns; medians. The "
        "ratio is the median over the rounds."
    )
    names = (f"batch of base and {tenants} tenant{'s' if tenants != 1 else ''}", "same, all base")
    column = max(map(len, names)) + 2
    lines = [
        f"{names[0]:<{column}}{speed.mixed_median:8.1f} tokens/s  {_range(speed.mixed)}",
        f"{names[1]:<{column}}{speed.plain_median:8.1f} tokens/s  {_range(speed.plain)}",
        f"{'ratio':<{column}}{speed.ratio:8.3f}",
        "",
        *textwrap.wrap(note, width),
    ]
    if any(max(rates) > NOISY * min(rates) for rates in (speed.mixed, speed.plain)):
        noise = (
            "The rounds differ much, so the figures mean little: other programs seem to use this "
            "machine. Run the demo again when it is quiet."
        )
        lines += ["", *textwrap.wrap(noise, width)]
    return "\n".join(lines)


def _range(rates: Sequence[float]) -> str:
    return f"({min(rates):.1f} to {max(rates):.1f})"


def report(
    settings: EngineSettings,
    batch: Sequence[Request],
    answers: Sequence[Answer],
    speed: Speed,
    description: str,
) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "model": settings.model,
        "engine": description,
        "adapters": {
            name: {"path": adapter.path, "digest": adapter.digest}
            for name, adapter in settings.adapters.items()
        },
        "answers": [
            asdict(row) | asdict(answer) for row, answer in zip(batch, answers, strict=True)
        ],
        "speed": asdict(speed)
        | {
            "unit": "generated tokens per second",
            "mixed_median": speed.mixed_median,
            "plain_median": speed.plain_median,
            "ratio": speed.ratio,
        },
    }


def first_line(error: BaseException) -> str:
    """An error's message in one line, or its kind if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _write_json(path: str, values: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise PedroError(f"cannot write {path}: {error.strerror}") from error


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
        PedroError: something the user can put right; the message says what.
    """
    if not args.verbose:
        _be_quiet()
    # Everything is on this machine once the model has been fetched.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from .integration.demo import start_engine

    prompts = args.prompt or list(QUESTIONS)
    if not all(prompt.strip() for prompt in prompts):
        raise PedroError("--prompt: expected a text, found an empty one")
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise PedroError(f"cannot write {args.json}: its folder does not exist")
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
    settings = EngineSettings(
        model, adapters, len(batch), args.max_tokens, args.compile, args.verbose
    )

    _say(f"model     {model}")
    for name, adapter in adapters.items():
        _say(f"adapter   {name}: {_size(adapter)} in {adapter.path}")
    _say(f"starting vLLM ({'compiled: minutes' if args.compile else 'about 30 s'}) ...")
    began = time.monotonic()
    with start_engine(settings) as engine:
        _say(f"ready after {time.monotonic() - began:.0f} s: {engine.description}")
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)

        answers = engine.generate(batch, args.max_tokens)
        _say(f"\n{len(batch)} rows, one batch:")
        _say(format_answers(batch, answers, width))

        _say("\nwarming up ...")
        speed = measure(engine, batch, args.max_tokens, say=_say)
        _say("\n" + format_speed(speed, len(adapters), engine.description, width))
        description = engine.description
    if args.json is not None:
        _write_json(args.json, report(settings, batch, answers, speed, description))
        _say(f"\nwritten: {args.json}")
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
