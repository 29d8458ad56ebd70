"""Scope "answer": tokens before the pooled one are the backbone's, the others are scaled."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_pedro import PedroConfig, PedroError, PedroModel, get_pedro_model
from vllm_pedro.model.reference import reference_logits

LENGTHS = [5, 7]
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def backbone() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(backbone: LlamaForCausalLM) -> PedroModel:
    config = PedroConfig(r=4, scope="answer", input_norm="rms", activation="gelu")
    model = get_pedro_model(copy.deepcopy(backbone), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "vector_generators" in name:
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def rows(model: PedroModel) -> list[torch.Tensor]:
    """The two sequences' logits, each run alone."""
    return [reference_logits(model, IDS[i].tolist(), LENGTHS[i]) for i in range(2)]


def by_hand(backbone: LlamaForCausalLM, model: PedroModel, ids: torch.Tensor, pooled: int):
    """The definition, once more: vectors of token P - 1, multiplied into it and the rest."""
    vectors: dict[int, dict[str, torch.Tensor]] = {}
    handles = []
    for index, layer in enumerate(backbone.model.layers):
        generator = model.vector_generators["default"][index]

        def make(module, args, kwargs, index=index, generator=generator):
            hidden = args[0] if args else kwargs["hidden_states"]
            vectors[index] = generator(hidden[:, pooled - 1 : pooled], None)

        handles.append(layer.register_forward_pre_hook(make, with_kwargs=True))
        places = {
            "q_proj": layer.self_attn.q_proj,
            "v_proj": layer.self_attn.v_proj,
            "up_proj": layer.mlp.up_proj,
        }
        for name, module in places.items():

            def scale(module, args, output, index=index, name=name):
                output = output.clone()
                output[:, pooled - 1 :] *= vectors[index][name][:, None]
                return output

            handles.append(module.register_forward_hook(scale))
    try:
        with torch.no_grad():
            return backbone(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("row", [0, 1])
def test_equals_the_definition(row, backbone, model, rows) -> None:
    expected = by_hand(backbone, model, IDS[row], LENGTHS[row])
    torch.testing.assert_close(rows[row], expected, rtol=0, atol=1e-5)


def test_tokens_before_the_pooled_one_are_the_backbones(backbone, model) -> None:
    with torch.no_grad():
        plain = backbone(input_ids=IDS).logits
        scaled = model(input_ids=IDS, prompt_lengths=LENGTHS, use_cache=False).logits
    for row, length in enumerate(LENGTHS):
        assert torch.equal(scaled[row, : length - 1], plain[row, : length - 1])
        assert not (scaled[row, length - 1 :] == plain[row, length - 1 :]).all(dim=-1).any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, model, rows) -> None:
    padding, real = torch.zeros(2, 3, dtype=torch.long), torch.ones_like(IDS)
    parts = [padding, IDS] if side == "left" else [IDS, padding]
    masks = [padding, real] if side == "left" else [real, padding]
    mask = torch.cat(masks, dim=1)
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat(parts, dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            prompt_lengths=LENGTHS,
            use_cache=False,
        ).logits
    for row in range(2):
        torch.testing.assert_close(logits[row][mask[row] == 1], rows[row], rtol=0, atol=1e-5)


def test_packed_sequences(model, rows) -> None:
    with torch.no_grad():
        logits = model(
            input_ids=IDS.view(1, -1),
            position_ids=torch.arange(9).repeat(2)[None],
            prompt_lengths=LENGTHS,
        ).logits[0]
    torch.testing.assert_close(logits, torch.cat(rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_goes_on_from_the_prompt(beams, model) -> None:
    prompt = IDS[:1]
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        do_sample=False,
        num_beams=beams,
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
    )
    tokens = answer.sequences[0]
    logits = reference_logits(model, tokens.tolist(), prompt.shape[1])[8:-1]
    if beams == 1:
        assert torch.equal(logits.argmax(-1), tokens[9:])
    else:
        chosen = logits.log_softmax(-1).gather(1, tokens[9:, None]).sum()
        mean = chosen / len(tokens[9:])  # transformers' length penalty of 1
        torch.testing.assert_close(mean, answer.sequences_scores[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_single_sequences(checkpointed, model, backbone) -> None:
    trained = get_pedro_model(copy.deepcopy(backbone), model.pedro_configs["default"])
    trained.load_state_dict(model.state_dict())
    labels = IDS.clone()
    for row, length in enumerate(LENGTHS):
        labels[row, :length] = -100

    def gradients(batches) -> dict[str, torch.Tensor]:
        trained.zero_grad()
        for batch in batches:
            out = trained(input_ids=IDS[batch], labels=labels[batch], use_cache=False)
            count = (labels[batch][:, 1:] != -100).sum()
            (out.loss * count).backward()
        return {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}

    alone = gradients([[0], [1]])
    if checkpointed:
        trained.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        trained.train()
    together = gradients([[0, 1]])
    assert alone.keys() == together.keys()
    assert len(alone) > 0
    for name, gradient in alone.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(together[name], gradient, rtol=1e-3, atol=1e-5)


def test_the_key_is_saved_and_read(tmp_path, model, backbone) -> None:
    model.save_pretrained(tmp_path)
    assert PedroConfig.from_pretrained(tmp_path).scope == "answer"
    again = PedroModel.from_pretrained(copy.deepcopy(backbone), tmp_path)
    tokens = IDS[0].tolist()
    assert torch.equal(reference_logits(again, tokens, 5), reference_logits(model, tokens, 5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scope": "prompt"}, "scope: expected one of \\['sequence', 'answer'\\], found 'prompt'"),
        ({"scope": "answer", "pooling": "mean"}, "scope: 'answer' needs the pooling 'last'"),
    ],
)
def test_bad_values(values, message) -> None:
    with pytest.raises(PedroError, match=message):
        PedroConfig(**values)
