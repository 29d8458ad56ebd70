"""Models that see: prompts with images, against plain transformers. See `test_multimodal.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import vision
from engines import Mismatch, Oracle
from scenarios import greedy

from vllm_pedro import PedroRequest
from vllm_pedro.integration.frontend import processor as frontend

# isort: split
from vllm.exceptions import VLLMValidationError

pytestmark = pytest.mark.engine

KINDS = {
    "mistral3": "[IMG]",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
"""Models, and what stands for an image in a prompt's text."""
TENSORS = ("pixel_values", "image_sizes", "image_grid_thw")


@dataclass
class Row:
    """A prompt, its images, an adapter's folder, and P."""

    text: str
    images: list[Any]
    adapter: Path | None
    prompt_length: int | None = None


@dataclass
class Kind:
    """A model and what its prompts are compared with."""

    model: Path
    mark: str
    adapters: list[Path | None]
    oracle: Oracle
    processor: Any

    def rows(self) -> list[Row]:
        """Text, one image, another one with the same tokens, two; each with each adapter."""
        first, second, third = (vision.make_image(seed) for seed in range(3))
        one = f"What is {self.mark} here? "
        prompts = [
            ("Only text, and some more of it.", []),
            (one, [first]),
            (one, [second]),
            (one + f"And {self.mark}? ", [first, third]),
        ]
        return [Row(text, images, adapter) for text, images in prompts for adapter in self.adapters]

    def inputs(self, row: Row, generated: int) -> dict[str, torch.Tensor] | None:
        """What transformers takes beside the tokens."""
        if not row.images:
            return None
        encoded = self.processor(text=[row.text], images=row.images, return_tensors="pt")
        found = {k: v for k, v in encoded.items() if k in TENSORS}
        if "mm_token_type_ids" in encoded and "image_grid_thw" in encoded:
            kinds = encoded["mm_token_type_ids"]
            found["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, generated))
        return found

    def ask(self, llm: Any, rows: list[Row], **params: Any) -> list[Any]:
        prompts = [
            {"prompt": row.text}
            | ({"multi_modal_data": {"image": row.images}} if row.images else {})
            for row in rows
        ]
        requests = [
            row.adapter
            and PedroRequest(row.adapter.name, 1, str(row.adapter), prompt_length=row.prompt_length)
            for row in rows
        ]
        return llm.generate(prompts, greedy(6, **params), lora_request=requests, use_tqdm=False)

    def check(self, llm: Any, rows: list[Row], **params: Any) -> None:
        for row, output in zip(rows, self.ask(llm, rows, **params), strict=True):
            self.check_one(output, row)

    def check_one(self, output: Any, row: Row) -> None:
        inputs = self.inputs(row, len(output.outputs[0].token_ids))
        self.oracle.check(output, row.adapter, row.prompt_length, images=inputs)


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory, write_adapter):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp(request.param)
    model = getattr(vision, f"make_{request.param}")(folder / "model")
    attention, mlp = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    configs = {
        "last": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        "mean": {"target_modules": attention + mlp, "pooling": "mean"},
        "answer": {"target_modules": attention + mlp, "scope": "answer"},
    }
    random = {"scale": 0.2, "down_scale": 15.0}
    adapters = [
        write_adapter(model, folder / name, seed=seed, **random, **config)
        for seed, (name, config) in enumerate(configs.items())
    ]
    oracle = Oracle(model, keep=3, auto="AutoModelForImageTextToText")
    processor = AutoProcessor.from_pretrained(model)
    return Kind(model, KINDS[request.param], [None, *adapters], oracle, processor)


ONLY_MISTRAL3 = pytest.mark.parametrize("kind", ["mistral3"], indirect=True)


def test_as_a_language_model(kind, engine):
    """Without the tower, for text alone."""
    rows = [row for row in kind.rows() if not row.images]
    with engine(kind.model, limit_mm_per_prompt={"image": 0}) as llm:
        kind.check(llm, rows, prompt_logprobs=0)
        with pytest.raises(
            (ValueError, VLLMValidationError), match=r"At most 0 image|for text-only models"
        ):
            kind.ask(llm, [Row(kind.mark, [vision.make_image()], kind.adapters[1])])


@ONLY_MISTRAL3
def test_a_prompt_that_no_step_takes_is_refused(kind, engine):
    """The encoder takes as many tokens as a step does, or the largest image."""
    images = [vision.make_image(seed, 64, 64) for seed in range(2)]
    with engine(kind.model, max_num_batched_tokens=32, enable_prefix_caching=False) as llm:
        for pair in (images, images[:1] * 2):
            row = Row(kind.mark * 2, pair, kind.adapters[1])
            with pytest.raises(VLLMValidationError, match="max_num_batched_tokens of at least 41"):
                kind.ask(llm, [row])
        base = Row(kind.mark * 2, images, None)
        kind.check(llm, [base, Row("Look at " + kind.mark, images[:1], kind.adapters[1])])


@pytest.fixture(scope="module")
def llm(kind, engine):
    with engine(kind.model, limit_mm_per_prompt={"image": 2}, block_size=32) as llm:
        yield llm


def test_rows_are_exact(kind, llm):
    """And again, with all images, KV blocks and vectors cached."""
    rows = kind.rows()
    kind.check(llm, rows, prompt_logprobs=0)
    kind.check(llm, rows)


def test_images_left_out_of_the_digest_are_noticed(kind, llm, monkeypatch):
    monkeypatch.setattr(
        frontend, "digest_prompt", lambda tokens, images: frontend.digest_tokens(tokens)
    )
    text = f"Look at {kind.mark}, and say what it is."
    rows = [Row(text, [vision.make_image(seed)], kind.adapters[1]) for seed in (10, 11)]
    with pytest.raises(Mismatch):
        kind.check(llm, rows)


def test_a_chat_goes_on_with_the_vectors_of_its_first_image(kind, llm):
    """P ends behind the first image; the second turn has another image behind it."""
    images = [vision.make_image(seed) for seed in (20, 21)]
    first = Row(f"See {kind.mark}, please. ", images[:1], kind.adapters[1])
    length = len(kind.ask(llm, [first])[0].prompt_token_ids)
    for adapter in kind.adapters[1:]:
        second = Row(first.text + f"Now {kind.mark}.", images, adapter, length)
        kind.check(llm, [second])
        before = Row(first.text, images[:1], adapter, 4)  # P ends before all images
        kind.check(llm, [before])


def test_p_within_an_image_is_refused(kind, llm):
    row = Row(f"Hi {kind.mark}", [vision.make_image()], kind.adapters[1], prompt_length=6)
    with pytest.raises(VLLMValidationError, match="prompt_length is 6, which is within the image"):
        kind.ask(llm, [row])
    kind.check(llm, [Row(row.text, row.images, row.adapter)])
