"""Metrics, the transformers engine, and vLLM beside it: what is served is what was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import start_engine, write_random_adapter
from tiny_task import make_backbone, make_rows, make_tokenizer
from transformers import AutoModelForCausalLM

from vllm_pedro.errors import PedroError
from vllm_pedro.model import PedroModel
from vllm_pedro.model.reference import NEAR_TIE_MARGIN, reference_score
from vllm_pedro.training.data import DataError, Example, Row, encode, prompt_tokens
from vllm_pedro.training.evaluate import (
    TransformersEngine,
    evaluate,
    final_number,
    squad_f1,
    squad_normalize,
)

TOKENIZER = make_tokenizer()
ROWS = [Row("", r["prompt"], r["completion"], r) for r in make_rows(12)]


class Parrot:
    """An engine that answers as it is told to, and takes note of what it is asked."""

    def __init__(self, answers: Sequence[str] = (), prefer: str = "") -> None:
        self.answers = answers
        self.prefer = TOKENIZER(prefer, add_special_tokens=False)["input_ids"]
        self.asked: list[tuple[list[int], int]] = []

    def generate(self, prompts: Any, lengths: Any, max_new_tokens: int) -> list[list[int]]:
        return [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in self.answers]

    def choose(self, prompts: Any, lengths: Any, allowed: Any) -> list[int]:
        self.asked += zip(prompts, lengths, strict=True)
        return [next((t for t in self.prefer if t in tokens), tokens[0]) for tokens in allowed]

    def completion_logprobs(self, examples: Sequence[Example]) -> list[list[float]]:
        return [[-1.0] * (len(example.completion) - 1) + [-4.0] for example in examples]


def test_squad_scores_are_squads() -> None:
    assert squad_normalize("The  Cat, a dog!") == "cat dog"
    assert squad_f1("the cat sat", "cat sat down") == 2 * 2 / (2 + 3)
    assert squad_f1("a", "the") == 1.0
    assert squad_f1("cat", "the") == 0.0
    rows = [Row("", "q", "x", {"answers": ["Paris", "in Paris"]}), Row("", "q", "Rome")]
    found = evaluate(Parrot(["In paris.", "Milan"]), TOKENIZER, rows, "f1-em")
    assert found == {"f1": 0.5, "exact_match": 0.5, "f1_em": 0.5, "rows": 2}


def test_exact_match_forgives_white_space_only() -> None:
    rows = [Row("", "q", " SELECT a"), Row("", "q", "b"), Row("", "q", "c")]
    found = evaluate(Parrot(["SELECT  a\n", "B", "c"]), TOKENIZER, rows, "exact-match")
    assert found == {"exact_match": 2 / 3, "rows": 3}


def test_the_final_number_is_gsm8ks() -> None:
    rows = [Row("", "q", f" 3 and 4 make it.\n#### {answer}") for answer in ("1,200", "-7", "0.5")]
    answers = ["It is 16-4 = 1200.00, so 1200.", "The answer is: -7", "5"]
    found = evaluate(Parrot(answers), TOKENIZER, rows, "final-number")
    assert found == {"final_number": 2 / 3, "rows": 3}
    assert final_number("16-4") == 4
    assert final_number("from 3 to -4.25%") == Decimal("-4.25")
    assert final_number("none") is None
    found = evaluate(Parrot(["none"]), TOKENIZER, [Row("", "q", "nor here")], "final-number")
    assert found["final_number"] == 0


def test_loss_is_the_mean_over_tokens() -> None:
    rows = [Row("", "q", "abc"), Row("", "q", "d")]
    found = evaluate(Parrot(), TOKENIZER, rows, "loss")
    assert found == {"loss": (3 * 1 + 4 + 1 + 4) / 6, "tokens": 6, "rows": 2}


def test_accuracy_chooses_among_labels_token_by_token() -> None:
    labels = [" no", " not", " yes"]
    rows = [Row("", "ab", label) for label in labels]
    parrot = Parrot(prefer="nt")
    found = evaluate(parrot, TOKENIZER, rows, "accuracy")
    assert found == {"accuracy": 1 / 3, "rows": 3}
    prompt = prompt_tokens(TOKENIZER, rows[0])
    space, n, o = TOKENIZER(" no", add_special_tokens=False)["input_ids"]
    # After the common space there is a choice, and after " no" another one: <eos> or "t".
    assert parrot.asked == [([*prompt, space], 3)] * 3 + [([*prompt, space, n, o], 3)] * 3


def test_data_that_have_no_accuracy() -> None:
    with pytest.raises(DataError, match="found 1; exact-match"):
        evaluate(Parrot(), TOKENIZER, [Row("", "q", "a")] * 2, "accuracy")
    with pytest.raises(DataError, match="found 101"):
        evaluate(Parrot(), TOKENIZER, [Row("", "q", f"x{i}") for i in range(101)], "accuracy")
    with pytest.raises(PedroError, match="metric: expected one of"):
        evaluate(Parrot(), TOKENIZER, ROWS, "bleu")


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_adapter(
        folder, tmp_path_factory.mktemp("adapter"), scale=0.3, down_scale=50.0
    )


@pytest.fixture(scope="module")
def model(folder: Path, adapter: Path) -> PedroModel:
    return PedroModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)


def test_transformers_engine_is_the_reference(model: PedroModel) -> None:
    engine = TransformersEngine(model, pad_token_id=0, batch_tokens=40)
    prompts = [prompt_tokens(TOKENIZER, row) for row in ROWS]
    answers = engine.generate(prompts, list(map(len, prompts)), 6)
    for prompt, answer in zip(prompts, answers, strict=True):
        # An answer ends after six tokens, or before EOS, which was then the best token.
        want = reference_score(model, prompt, [*answer, 2][:6])
        assert want.greedy == want.tokens or want.near_ties
    examples = [encode(TOKENIZER, row) for row in ROWS]
    found = engine.completion_logprobs(examples)
    for example, line in zip(examples, found, strict=True):
        want = reference_score(model, example.prompt, example.completion)
        assert all(
            math.isclose(a, b, abs_tol=1e-4) for a, b in zip(line, want.logprobs, strict=True)
        )
    # The pooled length stays the prompt's when a label's first tokens follow it.
    longer = [[*e.prompt, e.completion[0]] for e in examples]
    allowed = [list(range(3, 260))] * len(longer)
    chosen = engine.choose(longer, [len(e.prompt) for e in examples], allowed)
    for example, token in zip(examples, chosen, strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*example.prompt, example.completion[0]]])
            logits = model(ids, prompt_lengths=[len(example.prompt)]).logits[0, -1, 3:]
        assert (
            token == 3 + int(logits.argmax())
            or float(logits.topk(2).values.diff().abs()) < NEAR_TIE_MARGIN
        )


def test_a_bare_backbone_can_be_scored() -> None:
    engine = TransformersEngine(make_backbone(), pad_token_id=0)
    assert 0 <= evaluate(engine, TOKENIZER, ROWS, "accuracy")["accuracy"] <= 1
    assert evaluate(engine, TOKENIZER, ROWS, "loss")["loss"] > 0


@pytest.mark.engine
def test_served_is_trained(folder: Path, adapter: Path, model: PedroModel) -> None:
    from vllm_pedro.integration.evaluate import VllmEngine

    local = TransformersEngine(model, pad_token_id=0)
    prompts = [prompt_tokens(TOKENIZER, row) for row in ROWS]
    lengths = [len(prompt) - i % 2 for i, prompt in enumerate(prompts)]
    with start_engine(folder, max_model_len=64) as llm:
        served = VllmEngine(llm, str(adapter))
        answers = served.generate(prompts, lengths, 8)
        scores = {
            metric: evaluate(served, TOKENIZER, ROWS, metric) for metric in ("accuracy", "loss")
        }
    found = local.generate(prompts, lengths, 8)
    for prompt, length, answer, want in zip(prompts, lengths, answers, found, strict=True):
        assert answer == want or reference_score(model, prompt, want, length).near_ties
    assert scores["accuracy"] == evaluate(local, TOKENIZER, ROWS, "accuracy")
    here = evaluate(local, TOKENIZER, ROWS, "loss")["loss"]
    assert math.isclose(scores["loss"]["loss"], here, rel_tol=1e-5)
