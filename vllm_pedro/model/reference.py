"""What serving is compared with: plain transformers, float32, one sequence, no KV cache.

Nothing here is fast. The whole sequence is run at once, with the pooled length fixed, so that
neither a cache, nor batching, nor padding can hide a mistake.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PedroError
from . import PedroModel

NEAR_TIE_MARGIN = 1e-3
"""Where the two best logits are closer than this, float32 arithmetic in another order may swap
them, so a token that differs there is reported apart."""


@dataclass
class Reference:
    """A continuation as the reference scores it.

    Attributes:
        tokens: the continuation's token ids, N of them.
        margins: at each of the N steps, the best logit minus the second best.
        logprobs: at each of the N steps, the log probability of the token.
        prompt_logprobs: of each prompt token but the first, its log probability.
        greedy: at each of the N steps, the token with the best logit.
    """

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    greedy: list[int] = field(default_factory=list)

    @property
    def near_ties(self) -> list[int]:
        """Steps at which the choice of token hangs on rounding."""
        return [step for step, margin in enumerate(self.margins) if margin < NEAR_TIE_MARGIN]


@torch.no_grad()
def reference_logits(
    model: nn.Module,
    token_ids: Sequence[int],
    prompt_length: int | None = None,
    images: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Logits after every token of one sequence.

    Args:
        model: a `PedroModel`, or a bare backbone for rows without an adapter; float32.
        token_ids: the sequence, T tokens.
        prompt_length: pooled length P; None for all T tokens. A bare backbone ignores it.
        images: what the model's processor made of the sequence's images, by name.

    Returns:
        `[T, vocabulary]`, float32.

    Raises:
        PedroError: the model is not in float32, or P is not between 1 and T.
    """
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        raise PedroError(f"the reference is computed in float32, but the model has {dtypes}")
    device = next(model.parameters()).device
    extra: dict[str, Any] = dict(images or {})
    if isinstance(model, PedroModel) and prompt_length is not None:
        extra["prompt_lengths"] = [prompt_length]
    was_training = model.training
    model.eval()
    try:
        ids = torch.tensor([list(token_ids)], device=device)
        logits: Tensor = model(input_ids=ids, use_cache=False, **extra).logits
    finally:
        model.train(was_training)
    return logits[0].float()


def reference_score(
    model: nn.Module,
    token_ids: Sequence[int],
    continuation: Sequence[int],
    prompt_length: int | None = None,
    images: Mapping[str, Tensor] | None = None,
) -> Reference:
    """Score a given continuation, in one forward pass.

    Args:
        model: a `PedroModel`, or a bare backbone; float32.
        token_ids: the prompt.
        continuation: the tokens after it.
        prompt_length: pooled length P; None for all of `token_ids`.
        images: see `reference_logits`.

    Returns:
        The continuation with its log probabilities; `margins` tells where greedy decoding hangs
        on rounding, whichever token it chose.
    """
    pooled = len(token_ids) if prompt_length is None else prompt_length
    sequence = [*token_ids, *continuation]
    logits = reference_logits(model, sequence, pooled, images)
    scored = _logprobs(logits[:-1], sequence[1:])
    start = len(token_ids) - 1
    return Reference(
        list(continuation),
        [_margin(row) for row in logits[start:-1]],
        scored[start:],
        scored[:start],
        logits[start:-1].argmax(-1).tolist(),
    )


def _margin(logits: Tensor) -> float:
    best, second = logits.topk(2).values.tolist()
    return float(best - second)


def _logprobs(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    rows = torch.log_softmax(logits, dim=-1)
    return [float(row[token]) for row, token in zip(rows, tokens, strict=True)]
