"""What a student learns from, and the trainer with the loss that does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..model import IGNORED_LABEL
from ..training.data import Example
from ..training.trainer import PedroTrainer
from .answers import Answer
from .divergence import divergence, log_bins

_KEYS = ("teacher_ids", "teacher_bins", "teacher_weights", "teacher_temperatures")


@dataclass(frozen=True)
class Lesson(Example):
    """A prompt, an answer of T tokens, and what the teacher found likely in its places.

    Attributes:
        ids: `[T, k]` int32, the teacher's likeliest tokens.
        bins: `[T, k + 1]` float32, see `Answer`.
        weight: what the lesson's tokens count.
        temperature: of the loss.
    """

    ids: NDArray[np.int32] = field(default=None, repr=False)  # type: ignore[arg-type]
    bins: NDArray[np.float32] = field(default=None, repr=False)  # type: ignore[arg-type]
    weight: float = 1.0
    temperature: float = 1.0


def lesson_of(
    prompt: Example, answer: Answer, weight: float = 1.0, temperature: float = 1.0
) -> Lesson:
    """A lesson from a teacher's answer; of `prompt` the completion is not used."""
    return Lesson(
        prompt.prompt,
        answer.tokens,
        prompt.source,
        prompt.pooled,
        answer.ids,
        answer.bins,
        weight,
        temperature,
    )


def lesson_of_label(example: Example, top_k: int, vocabulary: int, weight: float) -> Lesson:
    """A lesson from a label: cross-entropy is the divergence from what is sure of it."""
    tokens = np.array(example.completion, np.int32)[:, None]
    ids = (tokens + np.arange(top_k, dtype=np.int32)) % vocabulary
    bins = np.full((len(tokens), top_k + 1), -np.inf, np.float32)
    bins[:, 0] = 0.0
    return Lesson(
        example.prompt, example.completion, example.source, example.pooled, ids, bins, weight
    )


@dataclass(frozen=True)
class LessonCollator:
    """Batches of a collator for examples, with what the teacher found likely beside them.

    Attributes:
        plain: the collator.
    """

    plain: Callable[[Sequence[Example]], dict[str, Tensor]]

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        """Make a batch.

        Returns:
            The plain batch, and of the N completion tokens, in the order of the lessons,
            `teacher_ids` `[N, k]`, `teacher_bins` `[N, k + 1]`, `teacher_weights` and
            `teacher_temperatures` `[N]`.
        """
        numbers = torch.tensor([len(lesson.completion) for lesson in lessons])
        weights = torch.tensor([lesson.weight for lesson in lessons])
        temperatures = torch.tensor([lesson.temperature for lesson in lessons])
        return self.plain(lessons) | {
            "teacher_ids": torch.from_numpy(np.concatenate([x.ids for x in lessons])).long(),
            "teacher_bins": torch.from_numpy(np.concatenate([x.bins for x in lessons])),
            "teacher_weights": weights.repeat_interleave(numbers),
            "teacher_temperatures": temperatures.repeat_interleave(numbers),
        }


class DistillTrainer(PedroTrainer):
    """`PedroTrainer` whose loss is the divergence from a teacher, in nats a token.

    Batches are those of `LessonCollator`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._teacher: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs, compute_loss_func=self._divergence)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self._teacher = {key: inputs[key] for key in _KEYS}
        plain = {key: value for key, value in inputs.items() if key not in _KEYS}
        return super().compute_loss(model, plain, return_outputs, num_items_in_batch)

    def _divergence(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The loss from logits and targets that stand in the same columns."""
        ids, bins, weights, temperatures = (self._teacher[key] for key in _KEYS)
        found = log_bins(outputs.logits[labels != IGNORED_LABEL], ids)
        losses = weights * divergence(bins, found, temperatures)
        return losses.sum() / (len(losses) if num_items_in_batch is None else num_items_in_batch)
