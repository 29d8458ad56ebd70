"""From tokenised rows to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import IGNORED_LABEL
from .data import Example


@dataclass(frozen=True)
class CompletionCollator:
    """Batches with labels on the completions only, and the pooled lengths beside them.

    All prompts end, and all completions begin, in the same column. Logits, for a small model with a
    large vocabulary a third of the work, are then needed for the last columns only.

    Attributes:
        pad_token_id: what fills the columns that are masked out.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Make a batch.

        Returns:
            `input_ids`, `attention_mask`, `position_ids` and `labels`, int64 `[B, S]`, and
            `prompt_lengths`, int64 `[B]`.
        """
        left = max(len(example.prompt) for example in examples)
        right = max(len(example.completion) for example in examples)
        ids = torch.full((len(examples), left + right), self.pad_token_id)
        labels = torch.full_like(ids, IGNORED_LABEL)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            begin, end = left - len(example.prompt), left + len(example.completion)
            ids[row, begin:end] = torch.tensor(example.prompt + example.completion)
            labels[row, left:end] = torch.tensor(example.completion)
            mask[row, begin:end] = 1
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "labels": labels,
            "prompt_lengths": torch.tensor([example.prompt_length for example in examples]),
        }


@dataclass(frozen=True)
class PackedCollator:
    """Batches without padding: the sequences stand one behind the other in a single row.

    transformers keeps their attention apart by `position_ids`, which start again at each sequence,
    and `PedroModel` pools each over its own prompt.
    """

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Make a batch of N sequences, T tokens in all.

        Returns:
            `input_ids`, `position_ids` and `labels`, int64 `[1, T]`, and `prompt_lengths`, int64
            `[N]`.
        """
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        for example in examples:
            ids += example.prompt + example.completion
            labels += [IGNORED_LABEL] * len(example.prompt) + example.completion
            positions += range(len(example))
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "labels": torch.tensor([labels]),
            "prompt_lengths": torch.tensor([example.prompt_length for example in examples]),
        }
