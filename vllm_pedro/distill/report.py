"""How well a student imitates its teacher, in figures and in one line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from .divergence import divergence, log_bins
from .engine import TransformersTeacher
from .lessons import Lesson

REPORT_NAME: Final = "report.json"
ROWS_NAME: Final = "report_rows.jsonl"
LEAST_KL: Final = 1e-6
"""Nats a token below which a teacher is the backbone itself."""


@dataclass(frozen=True)
class Likeness:
    """What a model makes of a teacher's greedy answers, the answer so far being the teacher's.

    Attributes:
        kl: KL(teacher || model) over the bins of `divergence`, nats a token.
        top_token: share of tokens where both find the same one likeliest.
        whole_answer: share of answers where they do all the way, so that the model's own greedy
            answer is the teacher's.
        perplexity: of the teacher's answers.
    """

    kl: float
    top_token: float
    whole_answer: float
    perplexity: float


@dataclass(frozen=True)
class Comparison:
    """A model beside a teacher: the figures, and those of each lesson."""

    likeness: Likeness
    kls: list[float]
    same: list[bool]


@torch.inference_mode()
def compare(engine: TransformersTeacher, lessons: Sequence[Lesson]) -> Comparison:
    """Compare a model with the teacher whose greedy answers the lessons are."""
    kls, losses = [0.0] * len(lessons), [0.0] * len(lessons)
    tops = [0] * len(lessons)
    for i, logits in engine.logits(lessons):
        lesson = lessons[i]
        ids = torch.from_numpy(lesson.ids).long().to(logits.device)
        tokens = torch.tensor(lesson.completion, device=logits.device)
        teacher = torch.from_numpy(lesson.bins).to(logits.device)
        kls[i] = float(divergence(teacher, log_bins(logits, ids)).sum())
        losses[i] = float(torch.nn.functional.cross_entropy(logits, tokens, reduction="sum"))
        tops[i] = int((logits.argmax(dim=1) == tokens).sum())
    lengths = [len(lesson.completion) for lesson in lessons]
    number = sum(lengths)
    same = [top == length for top, length in zip(tops, lengths, strict=True)]
    likeness = Likeness(
        sum(kls) / number, sum(tops) / number, sum(same) / len(same), perplexity_of(losses, number)
    )
    return Comparison(likeness, [k / n for k, n in zip(kls, lengths, strict=True)], same)


def perplexity_of(losses: Sequence[float], tokens: int) -> float:
    """Of tokens whose negative log likelihoods add up to those of `losses`."""
    return math.exp(min(sum(losses) / tokens, 700.0))


def teacher_perplexity(lessons: Sequence[Lesson]) -> float:
    """Of the teacher's greedy answers by its own lights: the first bin is the token's."""
    losses = [-float(lesson.bins[:, 0].sum()) for lesson in lessons]
    return perplexity_of(losses, sum(len(lesson.completion) for lesson in lessons))


def way_of(backbone: Likeness, student: Likeness) -> float | None:
    """How much of the way from backbone to teacher the student has gone, by the KL.

    1 is all of it, 0 none; below 0 it went elsewhere. None where there is no way to go.
    """
    return None if backbone.kl < LEAST_KL else 1.0 - student.kl / backbone.kl


def describe(report: dict[str, Any]) -> str:
    """The verdict, and a table of the three."""
    way, number = report["way"], report["prompts"]["test"]
    student, backbone = report["student"], report["backbone"]
    if way is None:
        text = "the teacher does what the backbone does: there is nothing to imitate"
    else:
        text = (
            f"the student has gone {way:.1%} of the way from the backbone to the teacher (KL "
            f"{backbone['kl']:.4g} -> {student['kl']:.4g} nats a token) and gives its whole greedy "
            f"answer to {round(student['whole_answer'] * number)} of {number} held-out prompts"
        )
    names = ("backbone", "teacher", "student")
    lines = [f"{'':<24}" + "".join(f"{name:>12}" for name in names)]
    for key in dict.fromkeys(key for name in names for key in report[name]):
        values = [report[name].get(key) for name in names]
        if all(isinstance(value, int | float | None) for value in values) and key != "rows":
            lines.append(
                f"{key:<24}"
                + "".join("-".rjust(12) if v is None else f"{v:>12.4g}" for v in values)
            )
    return "\n".join([*lines, text])
