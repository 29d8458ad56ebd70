"""Many teachers of one backbone: all asked in one engine, then their students one after another."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..errors import first_line
from ..training.run import load_tokenizer, say
from ..training.trainer import PedroTrainingArguments
from .report import REPORT_NAME
from .run import DistillJob, Server, Work, answer_all, learn, prepare
from .teachers import find_teacher

ATTEMPTS: Final = 2


@dataclass(frozen=True)
class Outcome:
    """What became of one teacher's student.

    Attributes:
        report: see `distill`; None if it failed.
        fault: why it failed, in one line.
        is_old: whether it was there already.
    """

    report: dict[str, Any] | None = None
    fault: str | None = None
    is_old: bool = False


def distill_fleet(
    jobs: Mapping[str, DistillJob],
    settings_of: Callable[[DistillJob], PedroTrainingArguments],
    load: Callable[[], Any],
    server: Server | None = None,
) -> dict[str, Outcome]:
    """Distil several teachers. What is done is skipped, what fails is tried once more at the end.

    Args:
        jobs: by name; of one backbone, each with an output folder of its own.
        settings_of: what to train a job's student with.
        load: gives the backbone; it is called again only after a training that failed.
        server: see `distill`.

    Returns:
        What became of each.
    """
    found: dict[str, Outcome] = {}
    left = dict(jobs)
    backbone: list[Any] = []
    for attempt in range(ATTEMPTS):
        failed: dict[str, Exception] = {}
        works: dict[str, Work] = {}
        for name, job in left.items():
            try:
                if (report := _done(job)) is not None and attempt == 0:
                    found[name] = Outcome(report, is_old=True)
                    continue
                # What an earlier run or attempt left is gone on with.
                again = attempt > 0 or not job.training.force
                training = dataclasses.replace(
                    job.training, resume=again, force=job.training.force and not again
                )
                job = dataclasses.replace(job, training=training)
                works[name] = prepare(job, settings_of(job), server)
            except Exception as error:  # a neighbour's fault, whatever it is, is its own
                failed[name] = error
        failed |= _answer(works, server)
        for name, work in works.items():
            if name in failed:
                continue
            say(f"{name}:")
            try:
                if not backbone:
                    backbone.append(load())
                report = learn(work, settings_of(work.job), backbone[0])
                found[name] = Outcome(report)
            except Exception as error:
                backbone.clear()  # it may have the failed student's hooks
                failed[name] = error
        for name, fault in failed.items():
            found[name] = Outcome(fault=first_line(fault))
            say(f"{name}: failed: {first_line(fault)}")
        left = {name: jobs[name] for name in failed}
        if not left:
            break
    return {name: found[name] for name in jobs}


def _done(job: DistillJob) -> dict[str, Any] | None:
    """The report of a student that is there, of this very teacher."""
    path = Path(job.training.output) / REPORT_NAME
    if job.training.force or not path.is_file():
        return None
    report: dict[str, Any] = json.loads(path.read_bytes())
    model = job.training.model
    teacher = find_teacher(job.teacher, model, load_tokenizer(model))
    return report if report.get("teacher_digest") == teacher.digest else None


def _answer(works: Mapping[str, Work], server: Server | None) -> dict[str, Exception]:
    """Have all teachers answer, or, if that fails, each alone; the faults of those that cannot."""
    try:
        answer_all(list(works.values()), server)
        return {}
    except Exception as error:
        say(f"not all teachers together: {first_line(error)}")
    failed: dict[str, Exception] = {}
    for name, work in works.items():
        try:
            answer_all([work], server)
        except Exception as error:
            failed[name] = error
    return failed


def summary(found: Mapping[str, Outcome]) -> tuple[Sequence[str], list[list[str]]]:
    """The head and the rows of a table."""
    head = ["teacher", "kind", "way", "KL", "same answer", "prompt share", "seconds", "bytes"]
    rows = []
    for name, outcome in found.items():
        report = outcome.report
        if report is None:
            rows.append([name, f"failed: {outcome.fault}", *[""] * 6])
            continue
        share, way = report["prompt_share"], report["way"]
        rows.append(
            [
                name,
                report["kind"] + (", was there" if outcome.is_old else ""),
                "-" if way is None else f"{way:.1%}",
                f"{report['student']['kl']:.3g}",
                f"{report['student']['whole_answer']:.1%}",
                "-" if share is None else f"{share:.1%}",
                f"{sum(report['seconds'].values()):.0f}",
                f"{report['bytes']['student']:,}",
            ]
        )
    return head, rows
