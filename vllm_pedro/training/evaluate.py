"""How good a model's answers are, with transformers or with vLLM: the same prompts, the same score.

An engine gives token ids for token ids; everything else, from the prompts' tokens to the score, is
the same code for both, so that two figures differ only where the engines do.
"""

from __future__ import annotations

import dataclasses
import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ..errors import PedroError
from ..model import takes_prompts
from .chat import DataError
from .choices import METRICS
from .collator import CompletionCollator
from .data import Example, Row, answers_of, encode, pooled_length, prompt_tokens

MAX_LABELS: Final = 100


class Engine(Protocol):
    """What a metric needs of an engine."""

    def generate(
        self, prompts: Sequence[list[int]], lengths: Sequence[int], max_new_tokens: int
    ) -> list[list[int]]:
        """Continuations, greedy or of a beam search, in the order of the prompts.

        They come without the token that ends them.

        The first `lengths[i]` tokens of prompt i are pooled.
        """

    def choose(
        self, prompts: Sequence[list[int]], lengths: Sequence[int], allowed: Sequence[list[int]]
    ) -> list[int]:
        """For each prompt the likeliest next token of those allowed; lengths as above."""

    def completion_logprobs(self, examples: Sequence[Example]) -> list[list[float]]:
        """The log probability of each token of each completion."""


# Metrics -----------------------------------------------------------------------------------------


def evaluate(
    engine: Engine,
    tokenizer: Any,
    rows: Sequence[Row],
    metric: str,
    max_new_tokens: int = 64,
    details: list[dict[str, Any]] | None = None,
) -> dict[str, float | int]:
    """Score an engine's answers.

    - "accuracy": the data's completions are the labels. The model's answer is the label that it
      reaches by always taking the likeliest token with which some label goes on.
    - "exact-match": a greedy answer is one of the row's answers, but for surrounding and repeated
      white space.
    - "f1-em": SQuAD's F1 and exact match, of a greedy answer and the best of the row's answers, and
      the mean of the two, which the paper reports.
    - "final-number": the last number in a greedy answer is the last one in one of the row's
      answers, as GSM8K asks for it.
    - "loss": mean negative log likelihood of the completions' tokens, with the one that ends them.

    Args:
        engine: what answers.
        tokenizer: its tokenizer.
        rows: the questions and their answers.
        metric: one of `METRICS`.
        max_new_tokens: where to cut a greedy answer.
        details: gets what each row was answered and scored.

    Returns:
        The scores by name (as fractions, not per cent), and the number of rows.

    Raises:
        PedroError: an unknown metric, or data it has no meaning for.
    """
    if metric not in METRICS:
        raise PedroError(f"metric: expected one of {list(METRICS)}, found {metric!r}")

    def keep(**columns: Sequence[Any]) -> None:
        if details is not None:
            for row, values in zip(rows, zip(*columns.values(), strict=True), strict=True):
                details.append({"row": row.source, **dict(zip(columns, values, strict=True))})

    if metric == "loss":
        lines = engine.completion_logprobs([encode(tokenizer, row) for row in rows])
        keep(loss=[-sum(line) / len(line) for line in lines], tokens=[len(line) for line in lines])
        values = [x for line in lines for x in line]
        return {"loss": -sum(values) / len(values), "tokens": len(values), "rows": len(rows)}
    if metric == "accuracy":
        labels = classify(engine, tokenizer, rows)
        right = [answer == row.completion for row, answer in zip(rows, labels, strict=True)]
        keep(answer=labels, expected=[row.completion for row in rows], right=right)
        return {"accuracy": sum(right) / len(rows), "rows": len(rows)}
    prompts = [prompt_tokens(tokenizer, row) for row in rows]
    lengths = [pooled_length(tokenizer, *both) for both in zip(rows, prompts, strict=True)]
    answers = [
        tokenizer.decode(tokens, skip_special_tokens=True)
        for tokens in engine.generate(prompts, lengths, max_new_tokens)
    ]
    expected = [answers_of(tokenizer, row) for row in rows]
    pairs = list(zip(answers, expected, strict=True))
    if metric == "exact-match":
        exact = [any(_spaced(a) == _spaced(b) for b in known) for a, known in pairs]
        keep(answer=answers, expected=expected, right=exact)
        return {"exact_match": sum(exact) / len(rows), "rows": len(rows)}
    if metric == "final-number":
        numbers = [(final_number(a), {final_number(b) for b in known}) for a, known in pairs]
        final = [number is not None and number in known for number, known in numbers]
        keep(answer=answers, expected=expected, right=final)
        return {"final_number": sum(final) / len(rows), "rows": len(rows)}
    f1 = [max(squad_f1(a, b) for b in known) for a, known in pairs]
    em = [any(squad_normalize(a) == squad_normalize(b) for b in known) for a, known in pairs]
    keep(answer=answers, expected=expected, f1=f1, right=em)
    means = (sum(f1) / len(rows), sum(em) / len(rows))
    return {"f1": means[0], "exact_match": means[1], "f1_em": sum(means) / 2, "rows": len(rows)}


def classify(engine: Engine, tokenizer: Any, rows: Sequence[Row]) -> list[str]:
    """Each row's likeliest label, the labels being the completions in `rows`."""
    if any(row.answer is not None for row in rows):
        raise DataError("accuracy: expected plain texts as labels, found tool calls or reasoning")
    labels = sorted({row.completion for row in rows})
    if not 2 <= len(labels) <= MAX_LABELS:
        raise DataError(
            f"accuracy: expected between 2 and {MAX_LABELS} different completions, the labels, "
            f"found {len(labels)}; exact-match or f1-em score free answers"
        )
    prompts = [prompt_tokens(tokenizer, row) for row in rows]
    lengths = [pooled_length(tokenizer, *both) for both in zip(rows, prompts, strict=True)]
    # Each row has its own, because a label's tokens can depend on the end of the prompt.
    left = [
        {
            label: encode(tokenizer, dataclasses.replace(row, completion=label)).completion
            for label in labels
        }
        for row in rows
    ]
    depth = 0
    while undecided := [i for i, codes in enumerate(left) if len(codes) > 1]:
        options = {
            i: sorted({_token(label, depth) for label in left[i].items()}) for i in undecided
        }
        asked = [i for i in undecided if len(options[i]) > 1]
        answers = engine.choose(
            [prompts[i] for i in asked], [lengths[i] for i in asked], [options[i] for i in asked]
        )
        chosen = {i: options[i][0] for i in undecided} | dict(zip(asked, answers, strict=True))
        for i, token in chosen.items():
            left[i] = {label: code for label, code in left[i].items() if code[depth] == token}
            prompts[i] = [*prompts[i], token]
        depth += 1
    return [next(iter(codes)) for codes in left]


def _token(label: tuple[str, list[int]], depth: int) -> int:
    text, code = label
    if depth >= len(code):
        raise DataError(
            f"accuracy: the label {text!r} is the beginning of another one, and the tokenizer has "
            "no end-of-sequence token to tell them apart"
        )
    return code[depth]


def _spaced(text: str) -> str:
    return " ".join(text.split())


def final_number(text: str) -> Decimal | None:
    """The last number in a text, without separators of thousands; None if there is none."""
    # A minus between two numbers is no sign.
    found = re.findall(r"(?<!\d)-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?", text)
    return Decimal(found[-1].replace(",", "")) if found else None


def squad_normalize(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return _spaced(re.sub(r"\b(a|an|the)\b", " ", text))


def squad_f1(answer: str, truth: str) -> float:
    """SQuAD's F1: harmonic mean of precision and recall of the words."""
    found, wanted = squad_normalize(answer).split(), squad_normalize(truth).split()
    if not found or not wanted:
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted))


# transformers ------------------------------------------------------------------------------------


class TransformersEngine:
    """A transformers model: a `PedroModel`, a PEFT model or a bare backbone.

    Args:
        model: the model.
        pad_token_id: what to pad with.
        batch_tokens: how many tokens to have in a batch at most, padding included; None for 4,096,
            or 512 on the CPU, where larger batches leave its caches and take longer a token.
        beams: of a free answer; 1 for the greedy one.
    """

    def __init__(
        self, model: Any, pad_token_id: int, batch_tokens: int | None = None, beams: int = 1
    ) -> None:
        self._beams = beams
        self._model = model
        self._pad = pad_token_id
        self._device = next(model.parameters()).device
        on_cpu = self._device.type == "cpu"
        self._batch_tokens = batch_tokens or (512 if on_cpu else 4096)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], lengths: Sequence[int], max_new_tokens: int
    ) -> list[list[int]]:
        self._model.eval()
        config = self._model.generation_config
        ends = config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        answers: list[list[int]] = [[] for _ in prompts]
        for chosen in self.batches([len(prompt) + max_new_tokens for prompt in prompts]):
            examples = [Example(prompts[i], [], pooled=lengths[i]) for i in chosen]
            batch = self.collate(examples)
            batch.pop("position_ids", None)
            output = self._model.generate(
                **batch,
                do_sample=False,
                num_beams=self._beams,
                max_new_tokens=max_new_tokens,
                pad_token_id=self._pad,
            )
            for i, row in zip(chosen, output[:, batch["input_ids"].shape[1] :], strict=True):
                answers[i] = _until(row.tolist(), ends)
        return answers

    @torch.inference_mode()
    def choose(
        self, prompts: Sequence[list[int]], lengths: Sequence[int], allowed: Sequence[list[int]]
    ) -> list[int]:
        self._model.eval()
        answers = [0] * len(prompts)
        for chosen in self.batches([len(prompt) for prompt in prompts]):
            batch = self.collate([Example(prompts[i], [], pooled=lengths[i]) for i in chosen])
            logits = self.forward(batch, 1)[:, -1]
            for row, i in enumerate(chosen):
                scores = logits[row, allowed[i]]
                answers[i] = allowed[i][int(scores.argmax())]
        return answers

    @torch.inference_mode()
    def completion_logprobs(self, examples: Sequence[Example]) -> list[list[float]]:
        self._model.eval()
        found: list[list[float]] = [[] for _ in examples]
        for chosen in self.batches([len(example) for example in examples]):
            batch = self.collate([examples[i] for i in chosen])
            width = max(len(examples[i].completion) for i in chosen)
            logits = self.forward(batch, width + 1)[:, :-1]
            scores = torch.log_softmax(logits.float(), dim=-1)
            for row, i in enumerate(chosen):
                tokens = torch.tensor(examples[i].completion, device=scores.device)
                line = scores[row, : len(tokens)].gather(1, tokens[:, None])
                found[i] = line.flatten().tolist()
        return found

    def forward(self, batch: dict[str, Tensor], columns: int) -> Tensor:
        """Logits of the last columns, `[B, columns, vocabulary]`."""
        # As indices: a number makes a strided slice, for which torch copies the output weights for
        # each row of the batch (bfloat16, CPU: four fifths of the time).
        keep = torch.arange(-columns, 0, device=self._device)
        logits: Tensor = self._model(**batch, use_cache=False, logits_to_keep=keep).logits
        return logits[:, -columns:]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch as the model takes it, without labels, on its device."""
        batch = CompletionCollator(self._pad)(examples)
        del batch["labels"]
        if not takes_prompts(self._model):
            del batch["prompt_lengths"]
        return {name: tensor.to(self._device) for name, tensor in batch.items()}

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices in batches of like length, the longest first; a batch again gives itself."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        batches: list[list[int]] = []
        for i in order:
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= self._batch_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches


def _until(tokens: list[int], ends: set[Any]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in ends:
            return tokens[:place]
    return tokens
