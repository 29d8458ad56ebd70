"""The reference that serving is compared with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_pedro.adapter import init_adapter, save_adapter
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.config import PedroConfig
from vllm_pedro.errors import PedroError
from vllm_pedro.model import PedroModel
from vllm_pedro.model.reference import Reference, reference_logits, reference_score

PROMPT = [5, 17, 33, 8, 21]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


@pytest.fixture(scope="module")
def model(backbone: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> PedroModel:
    path = tmp_path_factory.mktemp("adapter")
    shape = BackboneShape.from_hf_config(backbone.config)
    adapter = init_adapter(PedroConfig(r=4, input_norm="rms"), shape, seed=1, scale=0.4)
    save_adapter(path, adapter.config, adapter.tensors)
    return PedroModel.from_pretrained(backbone, path)


def test_logits(model: PedroModel, backbone: LlamaForCausalLM) -> None:
    logits = reference_logits(model, PROMPT)
    assert logits.shape == (5, 61)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, reference_logits(model, PROMPT, 5))
    assert not torch.allclose(logits, reference_logits(model, PROMPT, 4), atol=1e-2)
    bare = reference_logits(backbone, PROMPT)
    assert not torch.allclose(logits, bare, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(reference_logits(model, PROMPT), bare)
    with pytest.raises(PedroError, match=r"found \[6\]"):
        reference_logits(model, PROMPT, 6)


def generate(model: LlamaForCausalLM | PedroModel, tokens: list[int], number: int) -> list[int]:
    """What transformers generates greedily, with its KV cache."""
    found = model.generate(
        torch.tensor([tokens]),
        max_new_tokens=number,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0, len(tokens) :].tolist()


def test_score_follows_the_logits(model: PedroModel) -> None:
    tokens = [9, 40, 3, 17]
    result = reference_score(model, PROMPT, tokens)
    assert len(result.tokens) == len(result.margins) == len(result.logprobs) == 4
    sequence = list(PROMPT)
    for token, margin, logprob in zip(result.tokens, result.margins, result.logprobs, strict=True):
        # The pooled length stays that of the prompt while the sequence grows.
        last = reference_logits(model, sequence, 5)[-1]
        best, second = last.sort(descending=True).values[:2].tolist()
        assert margin == pytest.approx(best - second, abs=1e-5)
        assert logprob == pytest.approx(last.log_softmax(-1)[token].item(), abs=1e-5)
        sequence.append(token)
    rows = reference_logits(model, PROMPT).log_softmax(-1)
    want = [rows[i, PROMPT[i + 1]].item() for i in range(4)]
    assert result.prompt_logprobs == pytest.approx(want, abs=1e-5)


def test_score_agrees_with_the_cached_model(model: PedroModel, backbone: LlamaForCausalLM) -> None:
    for one in (model, backbone):
        tokens = generate(one, PROMPT, 8)
        assert reference_score(one, PROMPT, tokens).greedy == tokens


def test_continuing_with_a_fixed_length_is_resuming(model: PedroModel) -> None:
    tokens = generate(model, PROMPT, 8)
    whole = reference_score(model, PROMPT, tokens)
    start = [*PROMPT, *tokens[:3]]
    scored = reference_score(model, start, tokens[3:], prompt_length=5)
    assert scored.greedy == tokens[3:]
    assert scored.logprobs == pytest.approx(whole.logprobs[3:], abs=1e-5)
    assert scored.prompt_logprobs[-3:] == pytest.approx(whole.logprobs[:3], abs=1e-5)


def test_score_tells_the_best_tokens_of_another_continuation(model: PedroModel) -> None:
    given = [9, 40, 3]
    logits = reference_logits(model, [*PROMPT, *given], 5)
    best = logits[4:7].argmax(-1).tolist()
    scored = reference_score(model, PROMPT, given)
    assert scored.tokens == given
    assert scored.greedy == best != given


def test_near_ties() -> None:
    assert Reference(margins=[0.5, 0.0009, 0.001, 0.0]).near_ties == [1, 3]


def test_mode_is_restored(model: PedroModel) -> None:
    model.train()
    reference_logits(model, PROMPT)
    assert model.training
    assert model.base_model.training
    model.eval()


def test_only_float32(backbone: LlamaForCausalLM) -> None:
    half = LlamaForCausalLM(backbone.config).bfloat16()
    with pytest.raises(PedroError, match=r"float32, but the model has .*bfloat16"):
        reference_logits(half, PROMPT)
