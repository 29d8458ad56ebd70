"""The commands `vllm-pedro train` and `eval`.

Parsers are built without torch, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import PedroError
from ..training.choices import DTYPES, METRICS, RECIPES, STARTS
from .options import add_adapter_options, add_chat_options, config_of, refuse_adapter_options

if TYPE_CHECKING:
    from ..training.run import TrainingJob
    from ..training.trainer import PedroTrainingArguments

ENGINES = ("transformers", "vllm")

# The options of TrainingArguments that --help shows; all others are taken too.
_SHOWN: dict[str, tuple[str, str]] = {
    "max-steps": ("N", "optimizer steps; in place of --num-train-epochs"),
    "num-train-epochs": ("N", "passes over the data (3)"),
    "per-device-train-batch-size": ("N", "rows in a batch (8)"),
    "gradient-accumulation-steps": ("N", "batches in a step (1)"),
    "learning-rate": ("X", "(the recipe's)"),
    "down-learning-rate": ("X", "of the down projection W_down"),
    "coefficient-learning-rate": ("X", "of the activations' coefficients"),
    "coefficient-range": ("X", "divide the steps of coefficients of degree j by X^j"),
    "warmup-steps": ("X", "steps, or, below 1, their share of all (0.06)"),
    "weight-decay": ("X", "(0)"),
    "max-grad-norm": ("X", "gradients are clipped to it (1)"),
    "seed": ("N", "of the generators and the order of the rows (42)"),
    "eval-steps": ("N", "evaluate on --dev and save a checkpoint every N steps (100)"),
    "save-steps": ("N", "without --dev: save a checkpoint every N steps (500)"),
    "logging-steps": ("N", "(10)"),
}


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-pedro train`."""
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", metavar="FOLDER", required=True, help="the backbone's folder")
    data.add_argument(
        "--train",
        metavar="FILE",
        required=True,
        help="JSONL, JSONL.gz, CSV, Parquet or a folder of datasets': rows with 'prompt' and "
        "'completion', or with 'messages'; - is standard input",
    )
    data.add_argument("--dev", metavar="FILE", help="the same, to choose the best checkpoint by")
    data.add_argument("--test", metavar="FILE", help="the same, to score the finished adapter on")
    data.add_argument(
        "--test-metric", choices=METRICS, default="loss", help="for --test (%(default)s)"
    )
    data.add_argument("--output", metavar="FOLDER", required=True, help="for the adapter")
    add_student_options(parser, data)


def add_student_options(parser: argparse.ArgumentParser, data: argparse._ArgumentGroup) -> None:
    """The options of `train` that `distill` has too; those of the data go into a group."""
    data.add_argument(
        "--force", action="store_true", help="replace the adapter and checkpoints that are there"
    )
    data.add_argument(
        "--base-model-name",
        metavar="NAME",
        help="what the adapter's config calls the backbone, e.g. its name on the hub (--model)",
    )
    add_chat_options(data)
    data.add_argument(
        "--all-turns",
        action="store_true",
        help="learn every turn of the assistant in a chat, each from its own prompt, not the last "
        "alone",
    )
    data.add_argument("--max-length", type=int, metavar="N", help="leave longer rows out")
    data.add_argument("--limit", type=int, metavar="N", help="use the first N rows")
    data.add_argument("--dev-limit", type=int, metavar="N", help="use the first N rows of --dev")
    data.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="the backbone's (%(default)s)"
    )
    for bits in (4, 8):
        data.add_argument(
            f"--load-in-{bits}bit",
            dest="bits",
            action="store_const",
            const=bits,
            help=f"quantise the backbone to {bits} bits (bitsandbytes)",
        )
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--adapter", metavar="FOLDER", help="start from it, not from a fresh one")
    add_adapter_options(adapter, activation=None)
    more = parser.add_argument_group("training")
    conditioned, plain = RECIPES
    more.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default=conditioned,
        help=f"what --start, --activation and the rates are unless given: {conditioned} makes "
        f"adapters that use the prompt, {plain} is the paper's start and rates (%(default)s)",
    )
    more.add_argument(
        "--start",
        choices=STARTS,
        help="of the down projection: from the training prompts' pooled states, with a down bias, "
        "or random (the recipe's)",
    )
    more.add_argument(
        "--bilevel",
        action="store_true",
        help="learn the activations' coefficients on held-out training data (the paper)",
    )
    more.add_argument(
        "--fan-in-learning-rates",
        action=argparse.BooleanOptionalAction,
        help="scale the generators' learning rates by their number of inputs (the recipe's)",
    )
    more.add_argument("--held-out-fraction", type=float, metavar="X", help="for --bilevel (0.2)")
    more.add_argument(
        "--held-out", metavar="FILE", help="for --bilevel: these data, in place of a fraction"
    )
    more.add_argument("--packing", action="store_true", help="pack the rows of a batch into one")
    more.add_argument(
        "--patience", type=int, metavar="N", help="stop after N evaluations without a better loss"
    )
    more.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    more.add_argument(
        "--save-dtype", choices=DTYPES[1:], default="float32", help="of the file (%(default)s)"
    )
    for name, (metavar, text) in _SHOWN.items():
        more.add_argument(f"--{name}", metavar=metavar, help=text)
    parser.epilog = (
        "Every other option of transformers' TrainingArguments is taken too, e.g. "
        "--gradient-checkpointing true, --optim adamw_torch_fused."
    )


def training_arguments(
    args: argparse.Namespace, others: Sequence[str], evaluates: bool, eval_steps: int = 100
) -> PedroTrainingArguments:
    """TrainingArguments from the options that were given, and the defaults of this command.

    Args:
        args: the options that are known.
        others: those for TrainingArguments.
        evaluates: whether there are rows to choose the checkpoint by.
        eval_steps: how often, unless given.

    Raises:
        PedroError: an option that TrainingArguments does not have, or a value that it refuses.
    """
    from transformers import HfArgumentParser

    from ..training.trainer import PedroTrainingArguments

    argv = ["--output_dir", args.output, "--report_to", "none"]
    defaults = {"save_total_limit": "2"}
    if not evaluates:
        defaults["save_strategy"] = "steps"
    else:
        steps = str(args.eval_steps or eval_steps)
        defaults |= {"eval_strategy": "steps", "eval_steps": steps, "save_strategy": "steps"}
        defaults |= {"save_steps": steps, "load_best_model_at_end": "true"}
        defaults |= {"metric_for_best_model": "eval_loss", "greater_is_better": "false"}
    given = {name: getattr(args, name.replace("-", "_")) for name in _SHOWN}
    options = defaults | {
        name.replace("-", "_"): value for name, value in given.items() if value is not None
    }
    for name, value in options.items():
        argv += [f"--{name}", str(value)]
    for name in ("bilevel", "fan_in_learning_rates"):
        if getattr(args, name):
            argv += [f"--{name}", "true"]
    if args.held_out_fraction is not None:
        argv += ["--held_out_fraction", str(args.held_out_fraction)]

    def refuse(message: str) -> NoReturn:
        raise PedroError(message)

    parser = HfArgumentParser(PedroTrainingArguments, allow_abbrev=False)
    parser.error = refuse  # in place of argparse's, which prints the usage and exits
    try:
        (result,) = parser.parse_args_into_dataclasses([*argv, *others])
    except PedroError:
        raise
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        known = {entry.name for entry in dataclasses.fields(PedroTrainingArguments)}
        names = [word.partition("=")[0] for word in others if word.startswith("--")]
        unknown = [name for name in names if name[2:].replace("-", "_") not in known]
        if unknown:
            raise PedroError(f"unknown option {unknown[0]}") from None
        raise PedroError(str(error)) from error
    if result.max_steps == 0:
        raise PedroError("--max-steps: expected 1 or more, found 0")
    return result


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
    train = commands.add_parser(
        "train",
        help="train an adapter",
        description="Train an adapter for a model on prompts and completions.",
        allow_abbrev=False,
    )
    add_train_options(train)

    evaluate = commands.add_parser(
        "eval",
        help="score a model's answers, with or without an adapter",
        description="Score answers with transformers or vLLM. Prints one JSON object as its last "
        "line.",
    )
    evaluate.add_argument("--model", metavar="FOLDER", required=True, help="the backbone's folder")
    evaluate.add_argument("--adapter", metavar="FOLDER", help="without: the plain model")
    evaluate.add_argument("--data", metavar="FILE", required=True, help="JSONL or JSONL.gz")
    add_chat_options(evaluate)
    evaluate.add_argument("--all-turns", action="store_true", help="score every turn of a chat")
    evaluate.add_argument(
        "--metric",
        choices=METRICS,
        required=True,
        help="accuracy: the likeliest of the data's completions; exact-match, f1-em (SQuAD's F1, "
        "exact match and their mean) and final-number: of free answers; loss: mean over "
        "completions' tokens",
    )
    evaluate.add_argument(
        "--beams", type=int, metavar="N", default=1, help="of a free answer (1: greedy)"
    )
    evaluate.add_argument(
        "--output", metavar="FILE", help="JSONL for what each row was answered and scored"
    )
    evaluate.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="(%(default)s)")
    evaluate.add_argument("--dtype", choices=DTYPES, default="auto", help="(%(default)s)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="use the first N rows")
    evaluate.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=64, help="of a free answer (%(default)s)"
    )
    evaluate.set_defaults(run=run_eval)


def main_train(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Run `vllm-pedro train`, whose unknown options go to TrainingArguments."""
    args, others = parser.parse_known_args(argv)
    return run_train(args, others, argv)


def run_train(args: argparse.Namespace, others: Sequence[str], argv: Sequence[str]) -> int:
    from ..training.run import train

    job = training_job(args, argv)
    settings = training_arguments(args, others, args.dev is not None)
    record = train(job, settings)
    if settings.process_index == 0:
        summary: dict[str, Any] = {"adapter": args.output, **record}
        print(json.dumps(summary, ensure_ascii=False))
    return 0


def training_job(args: argparse.Namespace, argv: Sequence[str]) -> TrainingJob:
    """The job that the options of `train` ask for.

    Raises:
        PedroError: options that do not go together.
    """
    from ..training.run import TrainingJob

    if args.bilevel and args.activation is None:
        args.activation = ["rational"]
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.down_bias |= args.start == "data" and args.r > 0
    if args.adapter is not None:
        refuse_adapter_options(argv)
    if args.force and args.resume:
        raise PedroError("--force and --resume: give one of them")
    return TrainingJob(
        model=args.model,
        train=args.train,
        output=args.output,
        config=config_of(args),
        start=args.start,
        dev=args.dev,
        dtype=args.dtype,
        bits=args.bits,
        max_length=args.max_length,
        limit=args.limit,
        dev_limit=args.dev_limit,
        prompt_length=args.prompt_length,
        all_turns=args.all_turns,
        chat_template_kwargs=args.chat_template_kwargs,
        packing=args.packing,
        patience=args.patience,
        resume=args.resume,
        adapter=args.adapter,
        force=args.force,
        held_out=args.held_out,
        test=args.test,
        test_metric=args.test_metric,
        save_dtype=args.save_dtype,
        command=["vllm-pedro", *argv],
    )


def run_eval(args: argparse.Namespace) -> int:
    from ..training.run import evaluate_files

    start_engine: Any = None
    if args.engine == "vllm":
        from ..integration import evaluate

        start_engine = evaluate.start_engine
    scores = evaluate_files(
        args.model,
        args.data,
        args.metric,
        adapter=args.adapter,
        start_engine=start_engine,
        dtype=args.dtype,
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
        prompt_length=args.prompt_length,
        all_turns=args.all_turns,
        chat_template_kwargs=args.chat_template_kwargs,
        beams=args.beams,
        output=args.output,
    )
    print(json.dumps(scores, ensure_ascii=False))
    return 0
