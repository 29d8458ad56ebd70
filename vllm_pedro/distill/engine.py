"""Asking a teacher: with transformers here, with vLLM in `integration.distill`, to the same end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..training.data import Example
from ..training.evaluate import Engine, TransformersEngine
from .answers import Answer
from .divergence import log_bins


@dataclass(frozen=True)
class Question:
    """A prompt and what is wanted of it.

    Attributes:
        prompt: its tokens.
        pooled: how many of the first are pooled, if the teacher is a PEDRO adapter.
        number: answers wanted: the greedy one first, the others sampled.
        seed: of the sampled ones.
        teacher: which teacher is asked, its folder.
    """

    prompt: list[int]
    pooled: int
    number: int
    seed: int
    teacher: str = ""


@dataclass(frozen=True)
class Sampling:
    """How answers are made.

    Attributes:
        max_new_tokens: where they are cut off.
        temperature: of the sampled ones. What is kept of their probabilities has none.
        top_k: how many of the likeliest tokens are kept.
    """

    max_new_tokens: int
    temperature: float
    top_k: int


class Teacher(Engine, Protocol):
    """What distillation needs of a teacher besides what a metric needs."""

    def answer(self, questions: Sequence[Question], how: Sampling) -> list[list[Answer]]:
        """The answers to each question."""


class TransformersTeacher(TransformersEngine):
    """A transformers model that teaches, or is compared with a teacher.

    Args:
        model: see `TransformersEngine`, as for the others.
        pad_token_id: what to pad with.
        end_tokens: what ends an answer.
    """

    def __init__(
        self, model: Any, pad_token_id: int, end_tokens: Sequence[int], **how: Any
    ) -> None:
        super().__init__(model, pad_token_id, **how)
        self._ends = list(end_tokens)

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], how: Sampling) -> list[list[Answer]]:
        self._model.eval()
        asked = [(i, n) for i, question in enumerate(questions) for n in range(question.number)]
        found: dict[tuple[int, int], Example] = {}
        for sampled in (False, True):
            mine = [(i, n) for i, n in asked if (n > 0) == sampled]
            lengths = [len(questions[i].prompt) + how.max_new_tokens for i, _ in mine]
            for chosen in self.batches(lengths):
                keys = [mine[place] for place in chosen]
                rows = [questions[i] for i, _ in keys]
                prompts = [Example(q.prompt, [], pooled=q.pooled) for q in rows]
                settings: dict[str, Any] = {"do_sample": False}
                if sampled:
                    settings = {"do_sample": True, "temperature": how.temperature}
                    settings |= {"top_p": 1.0, "top_k": 0}
                    torch.manual_seed(rows[0].seed * 1_000_003 + keys[0][1])
                tokens = self._continue(prompts, how.max_new_tokens, settings)
                for key, question, answer in zip(keys, rows, tokens, strict=True):
                    found[key] = Example(question.prompt, answer, pooled=question.pooled)
        order = list(found)
        answers: dict[tuple[int, int], Answer] = {}
        for place, logits in self.logits([found[key] for key in order]):
            ids = logits.topk(how.top_k, dim=1).indices
            bins = log_bins(logits, ids)
            key = order[place]
            answers[key] = Answer(
                found[key].completion,
                ids.cpu().numpy().astype(np.int32),
                bins.cpu().numpy().astype(np.float32),
            )
        return [[answers[i, n] for n in range(q.number)] for i, q in enumerate(questions)]

    def _continue(
        self, prompts: Sequence[Example], max_new_tokens: int, settings: dict[str, Any]
    ) -> list[list[int]]:
        """Answers with the token that ends them."""
        batch = self.collate(prompts)
        batch.pop("position_ids", None)
        output = self._model.generate(
            **batch,
            **settings,
            max_new_tokens=max_new_tokens,
            pad_token_id=self._pad,
            eos_token_id=self._ends or None,
        )
        answers = []
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in self._ends), len(row))
            answers.append(row[: end + 1])
        return answers

    @torch.inference_mode()
    def logits(self, examples: Sequence[Example]) -> Iterator[tuple[int, Tensor]]:
        """For each example, in some order, its number and `[T, V]` for its completion's tokens."""
        self._model.eval()
        for chosen in self.batches([len(example) for example in examples]):
            batch = self.collate([examples[i] for i in chosen])
            width = max(len(examples[i].completion) for i in chosen)
            logits = self.forward(batch, width + 1)[:, :-1].float()
            for row, i in enumerate(chosen):
                yield i, logits[row, : len(examples[i].completion)]
