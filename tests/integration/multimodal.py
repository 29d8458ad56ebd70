"""Models that see: prompts with images, against plain transformers. See `test_multimodal.py`.

On the CPU, vLLM's attention is causal among image tokens too, as transformers' is for Gemma 3 where
it is given no token types.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
import vision
from engines import Mismatch, Oracle
from scenarios import greedy

from vllm_pedro import PedroRequest
from vllm_pedro.bench.servers import serve
from vllm_pedro.integration.frontend import processor as frontend
from vllm_pedro.integration.scheduler import PedroSchedulerMixin

# isort: split
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

pytestmark = pytest.mark.engine

KINDS = {
    "mistral3": "[IMG]",
    "gemma3": "<start_of_image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
"""Models, and what stands for an image in a prompt's text."""
V2 = {"mistral3", "qwen2_5_vl"}
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

    def prompt(self, row: Row) -> dict[str, Any]:
        images = {"multi_modal_data": {"image": row.images}} if row.images else {}
        return {"prompt": row.text, **images}

    def ask(self, llm: Any, rows: list[Row], **params: Any) -> list[Any]:
        prompts = [self.prompt(row) for row in rows]
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


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.both_runners] * (name in V2)) for name in KINDS],
)
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


@pytest.mark.slow
@ONLY_MISTRAL3
def test_compiled(kind, engine):
    with engine(kind.model, limit_mm_per_prompt={"image": 2}, enforce_eager=False) as llm:
        kind.check(llm, kind.rows(), prompt_logprobs=0)


@pytest.mark.slow
@ONLY_MISTRAL3
def test_speculation(kind, engine):
    drafts = {"num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(kind.model, limit_mm_per_prompt={"image": 2}, speculative_config=drafts) as llm:
        kind.check(llm, kind.rows())


def steps_of_a_full_encoder(kind, engine):
    """At which steps they begin: a base row that takes all of the encoder, an adapter's with a
    cached image and a new one, and a text behind them; and what the second holds as it waits."""
    images = [vision.make_image(seed) for seed in range(4)]
    mark, adapter = kind.mark, kind.adapters[1]
    rows = {
        "full": Row(f"{mark} and {mark}", images[:2], None),
        "waits": Row(f"Two: {mark}, {mark}", images[2:], adapter),
        "text": Row("Text.", [], None),
    }
    with engine(kind.model, max_num_batched_tokens=256) as llm:
        kind.ask(llm, [Row(mark, [images[2]], adapter)])
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        scheduler.max_num_encoder_input_tokens = 8  # two images
        for number, (name, row) in enumerate(rows.items()):
            request = row.adapter and PedroRequest("a", 1, str(row.adapter))
            llm.llm_engine.add_request(
                name, kind.prompt(row), greedy(3), lora_request=request, arrival_time=number
            )
        first, outputs, held = {}, {}, None
        for step in range(1, 20):
            for output in llm.llm_engine.step():
                outputs[output.request_id] = output
                first.setdefault(output.request_id, step)
            if step == 1:
                held = [
                    i for i in scheduler.encoder_cache_manager.request_cached_ids if "wait" in i
                ]
    for name, row in rows.items():
        kind.check_one(outputs[name], row)
    return first, held


@ONLY_MISTRAL3
def test_a_full_encoder_delays_nobody_else(kind, engine, monkeypatch):
    """Nor does the prompt that waits for it hold images in its cache."""
    assert steps_of_a_full_encoder(kind, engine) == ({"full": 1, "waits": 2, "text": 1}, [])
    monkeypatch.setattr(PedroSchedulerMixin, "_pedro_encodes", lambda *_: True)
    first, held = steps_of_a_full_encoder(kind, engine)
    assert first["text"] > 1
    assert not held
    monkeypatch.setattr(PedroSchedulerMixin, "_pedro_unpin", lambda *_: None)
    assert steps_of_a_full_encoder(kind, engine)[1]


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


def url_of(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


@ONLY_MISTRAL3
def test_chats_with_images(kind, tmp_path):
    images = [vision.make_image(seed) for seed in range(3)]
    flags = ["--served-model-name", "base", "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-model-len", "256", "--max-num-seqs", "8", "--enable-pedro", "--pedro-modules"]
    flags += [f"a={kind.adapters[1]}", "--kv-cache-memory-bytes", str(64 << 20)]

    def user(image, text):
        part = {"type": "image_url", "image_url": {"url": url_of(image)}}
        return {"role": "user", "content": [part, {"type": "text", "text": text}]}

    with serve(kind.model, flags, tmp_path / "log", OMP_NUM_THREADS="1") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)

        def say(model, messages, pictures, length=None):
            extra = {"vllm_xargs": {"pedro_prompt_length": length}} if length else {}
            answer = client.chat.completions.with_raw_response.create(
                model=model, messages=messages, temperature=0, max_tokens=6,
                extra_body={"return_token_ids": True, "ignore_eos": True, **extra},
            )  # fmt: skip
            pooled = answer.headers.get("x-pedro-prompt-length")
            parsed = answer.parse()
            output = SimpleNamespace(
                prompt_token_ids=parsed.prompt_token_ids,
                prompt_logprobs=None,
                outputs=[SimpleNamespace(token_ids=parsed.choices[0].token_ids)],
            )
            row = Row(kind.mark * len(pictures), pictures, kind.adapters[1 if model == "a" else 0])
            row.prompt_length = pooled and int(pooled)
            kind.check_one(output, row)
            return parsed, pooled

        for image in images[:2]:
            for model in ("base", "a"):
                say(model, [user(image, "What is it?")], [image])
        first, pooled = say("a", [user(images[0], "What is it?")], images[:1], "first_turn")
        assert pooled == str(first.usage.prompt_tokens)
        talk = [
            user(images[0], "What is it?"),
            {"role": "assistant", "content": "Noise."},
            user(images[2], "And this?"),
        ]
        for _ in range(2):
            _, again = say("a", talk, [images[0], images[2]], "first_turn")
            assert again == pooled
        say("a", [{"role": "user", "content": "Only text"}], [])
        with pytest.raises(openai.BadRequestError, match="within the image"):
            say("a", talk, [images[0], images[2]], 12)
        say("a", talk, [images[0], images[2]])  # images of a refused request are sent again


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
    # So that the image is much of what is pooled.
    text = f"Look at {kind.mark}"
    rows = [Row(text, [vision.make_image(seed)], kind.adapters[2]) for seed in range(10, 14)]
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


def test_beams_see_the_image_of_their_prompt(kind, llm):
    row = Row(f"Say {kind.mark}.", [vision.make_image(30)], kind.adapters[1])
    (found,) = llm.beam_search(
        [kind.prompt(row)],
        BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True),
        lora_request=PedroRequest("a", 1, str(row.adapter)),
    )
    length = len(kind.ask(llm, [row])[0].prompt_token_ids)
    for beam in found.sequences:
        prompt, tokens = beam.tokens[:length], beam.tokens[length:]
        images = kind.inputs(row, len(tokens))
        reference = kind.oracle.score(prompt, tokens, row.adapter, images=images)
        assert beam.cum_logprob == pytest.approx(sum(reference.logprobs), abs=2e-3)
