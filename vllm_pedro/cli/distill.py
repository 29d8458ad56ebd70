"""The command `vllm-pedro distill`; its parser is built without torch."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import PedroError
from ..training.choices import METRICS
from .train import add_student_options, training_arguments, training_job

if TYPE_CHECKING:
    from ..distill.run import DistillJob
    from ..training.trainer import PedroTrainingArguments

ENGINES = ("auto", "transformers", "vllm")
EVAL_STEPS = 25
PATIENCE = 4
BELOW_THRESHOLD = 1


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "distill",
        help="make a PEDRO adapter out of a LoRA adapter or a fine-tuned model",
        description="Train an adapter to imitate a teacher on prompts, without labels, and say "
        "how well it does. Prints the report as one JSON object, its last line. Exit status: 0; 1 "
        "below --threshold; 2 for what the user can put right.",
        allow_abbrev=False,
    )
    data = parser.add_argument_group("teacher and prompts")
    data.add_argument("--model", metavar="FOLDER", required=True, help="the backbone's folder")
    who = data.add_mutually_exclusive_group(required=True)
    who.add_argument(
        "--teacher",
        metavar="FOLDER",
        help="a LoRA adapter or another of PEFT's, a PEDRO adapter, or a fine-tuned copy of "
        "--model",
    )
    data.add_argument(
        "--prompts",
        metavar="FILE",
        dest="train",
        help="rows as train takes them; completions, where there are any, are for --test-metric "
        "and --label-share alone",
    )
    who.add_argument(
        "--teachers",
        metavar="PATH",
        help="a fleet: a folder of such folders, or a file with one a line, or with an object of "
        "JSON: 'teacher', and 'name', 'prompts', 'dev', 'test' of its own",
    )
    data.add_argument(
        "--sample-prompts",
        type=int,
        metavar="N",
        default=0,
        help="without --prompts: sample N from the teacher, as the chat template has them begin",
    )
    data.add_argument(
        "--beginnings",
        metavar="FILE",
        help='for --sample-prompts: how they begin and end, lines of {"prompt": ..., "end": ...}',
    )
    data.add_argument("--dev", metavar="FILE", help="more prompts, to choose the checkpoint by")
    data.add_argument("--test", metavar="FILE", help="more prompts, for the report")
    data.add_argument(
        "--held-out-prompts",
        type=float,
        metavar="X",
        default=0.1,
        help="the part of --prompts to take for each of --dev and --test that is not given "
        "(%(default)s)",
    )
    data.add_argument(
        "--test-metric",
        choices=METRICS,
        default="loss",
        help="of backbone, teacher and student, on held-out rows with completions (%(default)s)",
    )
    data.add_argument(
        "--output",
        metavar="FOLDER",
        required=True,
        help="for adapter and report; of a fleet, for a folder each",
    )
    add_student_options(parser, data)
    asked = parser.add_argument_group("the teacher's answers")
    asked.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what the teacher answers with; auto: vLLM where it can serve it (%(default)s)",
    )
    asked.add_argument(
        "--answers",
        type=int,
        metavar="N",
        default=1,
        help="to each prompt: the greedy one, and N - 1 sampled (%(default)s)",
    )
    asked.add_argument(
        "--sample-temperature", type=float, metavar="X", default=1.0, help="(%(default)s)"
    )
    asked.add_argument(
        "--answer-seed", type=int, metavar="N", default=0, help="of sampled answers (%(default)s)"
    )
    asked.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=128, help="of an answer (%(default)s)"
    )
    asked.add_argument(
        "--top-k",
        type=int,
        metavar="N",
        default=32,
        help="likeliest tokens that are kept of each place (%(default)s)",
    )
    asked.add_argument("--answers-folder", metavar="FOLDER", help="where they are kept (--output)")
    loss = parser.add_argument_group("loss and verdict")
    loss.add_argument("--temperature", type=float, metavar="X", default=1.0, help="(%(default)s)")
    loss.add_argument(
        "--label-share",
        type=float,
        metavar="X",
        default=0.0,
        help="share of cross-entropy on the completions of rows that have them (%(default)s)",
    )
    loss.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="exit with 1 if the student has gone less than this part of the way",
    )
    parser.epilog = "Every other option of transformers' TrainingArguments is taken too."


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Run `vllm-pedro distill`, whose unknown options go to TrainingArguments."""
    args, others = parser.parse_known_args(argv)
    from ..training.run import choose_dtype, load_backbone

    settings = training_arguments(args, others, True, EVAL_STEPS)
    server = choose_server(args.engine, args.bits)

    def load() -> Any:
        dtype = choose_dtype(args.dtype, settings.use_cpu)
        return load_backbone(args.model, dtype, args.bits)[0]

    if args.teachers is not None:
        return run_fleet(args, others, argv, load, server)
    from ..distill.run import distill

    report = distill(job_of(args, argv), settings, load, server)
    print(json.dumps({"adapter": args.output, **report}, ensure_ascii=False))
    return BELOW_THRESHOLD if is_below(args.threshold, report) else 0


def is_below(threshold: float | None, report: dict[str, Any]) -> bool:
    """Whether a student has gone less of the way than it should."""
    return threshold is not None and report["way"] is not None and report["way"] < threshold


def run_fleet(
    args: argparse.Namespace, others: Sequence[str], argv: Sequence[str], load: Any, server: Any
) -> int:
    """Distil every teacher of `--teachers`. Prints a table, and what became of each as JSON."""
    from ..bench.tables import table
    from ..distill.fleet import distill_fleet, summary
    from ..distill.teachers import read_teachers

    jobs = {}
    for values in read_teachers(args.teachers):
        own = argparse.Namespace(**vars(args))
        own.teacher, own.train = values["teacher"], values.get("prompts", args.train)
        own.dev, own.test = values.get("dev", args.dev), values.get("test", args.test)
        own.output = os.path.join(args.output, values["name"])
        if args.answers_folder is not None:
            own.answers_folder = os.path.join(args.answers_folder, values["name"])
        jobs[values["name"]] = job_of(own, argv)

    def settings_of(job: DistillJob) -> PedroTrainingArguments:
        own = argparse.Namespace(**vars(args) | {"output": job.training.output})
        return training_arguments(own, others, True, EVAL_STEPS)

    found = distill_fleet(jobs, settings_of, load, server)
    print(table(*summary(found)))
    adapters = {name: outcome.report or {"fault": outcome.fault} for name, outcome in found.items()}
    print(json.dumps({"adapters": adapters}, ensure_ascii=False))
    if any(outcome.report is None for outcome in found.values()):
        return 2
    reports = [outcome.report for outcome in found.values() if outcome.report is not None]
    return BELOW_THRESHOLD if any(is_below(args.threshold, r) for r in reports) else 0


def job_of(args: argparse.Namespace, argv: Sequence[str]) -> DistillJob:
    """The job that the options ask for.

    Raises:
        PedroError: options that do not go together.
    """
    from ..distill.run import DistillJob

    if args.held_out is not None:
        raise PedroError("--held-out: not with distill; --held-out-fraction parts its answers")
    if (args.train is None) != (args.sample_prompts > 0):
        raise PedroError("expected either --prompts or, to sample them, --sample-prompts")
    if args.beginnings is not None and args.sample_prompts < 1:
        raise PedroError("--beginnings: only with --sample-prompts")
    args.train = args.train or ""
    if args.patience is None:
        args.patience = PATIENCE
    return DistillJob(
        training=training_job(args, argv),
        teacher=args.teacher,
        answers=args.answers,
        sample_temperature=args.sample_temperature,
        max_new_tokens=args.max_new_tokens,
        top_k=args.top_k,
        temperature=args.temperature,
        label_share=args.label_share,
        held_out=args.held_out_prompts,
        answer_seed=args.answer_seed,
        answers_folder=args.answers_folder,
        sample_prompts=args.sample_prompts,
        beginnings=args.beginnings,
    )


def choose_server(name: str, bits: int | None) -> Any:
    """What is to serve the teacher; None for transformers.

    Raises:
        PedroError: vLLM is asked for and cannot be had.
    """
    if name == "vllm" and bits is not None:
        raise PedroError("--engine vllm: not with a quantised backbone")
    if name == "transformers" or bits is not None:
        return None
    if importlib.util.find_spec("vllm") is None:
        if name == "vllm":
            raise PedroError("--engine vllm: vLLM is not installed")
        return None
    from ..integration import distill

    return distill
