"""A start made from the training prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import make_backbone, make_rows, make_tokenizer

from vllm_pedro.adapter import load_adapter
from vllm_pedro.config import POOLINGS, PedroConfig
from vllm_pedro.errors import PedroError
from vllm_pedro.generator import pool_prompt
from vllm_pedro.model import PedroModel, get_pedro_model
from vllm_pedro.training.collator import CompletionCollator
from vllm_pedro.training.data import Example, Row, encode
from vllm_pedro.training.start import DEVIATION, condition, pooled_states, start_of

TOKENIZER = make_tokenizer()
DATA = [encode(TOKENIZER, Row("", r["prompt"], r["completion"])) for r in make_rows(48)]
COLLATE = CompletionCollator(0)


def make(**config: Any) -> PedroModel:
    values: dict[str, Any] = {"r": 4, "input_norm": "rms", "down_bias": True}
    torch.manual_seed(3)
    return get_pedro_model(make_backbone(), PedroConfig(**(values | config)))


def states_of(number: int, d: int = 16, seed: int = 0) -> torch.Tensor:
    """Pooled states with a large common part and one massive dimension."""
    random = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 0.01, d)
    return 3 + scale * torch.randn(number, d, generator=random) + 50.0 * (torch.arange(d) == 2)


def test_inner_values_are_centred_and_of_one_size() -> None:
    states = states_of(200)
    drawn = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    found = start_of(states, drawn)
    assert found is not None
    down, bias = found
    assert (down.dtype, bias.dtype) == (torch.float32, torch.float32)
    inner = states.double() @ down.double().T + bias.double()
    assert inner.mean(dim=0).abs().max() < 1e-4
    assert torch.allclose(inner.std(dim=0, correction=0), torch.tensor(DEVIATION).double())
    # What is stored does what projecting, centring and scaling do, one after the other.
    mean = states.double().mean(dim=0)
    projection = torch.eye(16).double() - torch.outer(mean, mean) / mean.square().sum()
    projected = (states.double() - mean) @ projection @ drawn.double().T
    want = DEVIATION * projected / projected.std(dim=0, correction=0)
    assert torch.allclose(inner, want, atol=1e-4)


def test_a_file_of_16_bits_keeps_what_differs_between_prompts() -> None:
    """Though the common part of the states is a hundred times as large."""
    states = states_of(200)
    found = start_of(states, torch.randn(5, 16, generator=torch.Generator().manual_seed(1)))
    assert found is not None
    assert states.norm(dim=1).mean() > 100 * (states - states.mean(dim=0)).square().mean().sqrt()
    inner = states @ found[0].T + found[1]
    rounded = states @ found[0].bfloat16().float().T + found[1].bfloat16().float()
    assert (rounded - inner).abs().max() < 0.1 * DEVIATION


def test_states_that_are_all_the_same_make_no_start() -> None:
    assert start_of(torch.ones(20, 16) * 7, torch.randn(4, 16)) is None
    assert start_of(states_of(1), torch.randn(4, 16)) is None


def test_two_prompts_are_enough() -> None:
    states = states_of(2)
    found = start_of(states, torch.randn(8, 16, generator=torch.Generator().manual_seed(1)))
    assert found is not None
    inner = states @ found[0].T + found[1]
    assert torch.allclose(inner.abs(), torch.full((2, 8), DEVIATION), atol=1e-3)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("norm", [None, "rms"])
def test_pooled_states_are_what_w_down_sees(pooling: str, norm: str | None) -> None:
    model = make(pooling=pooling, input_norm=norm).train()
    rows = [Example(DATA[0].prompt, DATA[0].completion, "", 2), *DATA[1:11]]
    found = pooled_states(model, rows, COLLATE)
    assert model.training
    assert [tuple(states.shape) for states in found] == [(11, 32)] * 2
    model.eval()
    for number, row in enumerate(rows):
        ids = torch.tensor([row.prompt])
        hidden = model.base_model(ids, output_hidden_states=True).hidden_states
        for layer in range(2):
            want = pool_prompt(hidden[layer][0, : row.prompt_length], pooling, norm)
            assert torch.allclose(found[layer][number], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "rational", "relu"])
@torch.no_grad()
def test_a_conditioned_adapter_is_the_identity_and_trains(activation: str) -> None:
    model = make(activation=activation)
    ids = torch.tensor([DATA[0].prompt])
    before = model(ids).logits
    fresh = {name: tensor.clone() for name, tensor in model.adapter_tensors().items()}
    condition(model, DATA, COLLATE)
    assert torch.equal(model(ids).logits, before)
    changed = {n for n, t in model.adapter_tensors().items() if not torch.equal(t, fresh[n])}
    # All prompts end in one token, which is all that the first layer sees.
    name = "base_model.model.model.layers.1.vector_generator.down_proj."
    assert changed == {name + "weight", name + "bias"}
    inner = pooled_states(model, DATA, COLLATE)[1] @ model.adapter_tensors()[name + "weight"].T
    inner += model.adapter_tensors()[name + "bias"]
    assert inner.mean(dim=0).abs().max() < 1e-4
    assert float(inner.square().mean().sqrt()) == pytest.approx(DEVIATION, rel=1e-4)
    trained = model.vector_generators["default"][1]  # type: ignore[index]  # a ModuleList
    assert all(p.requires_grad for p in trained.parameters())


def test_the_same_data_give_the_same_start(tmp_path: Path) -> None:
    digests = set()
    for name in "ab":
        model = make()
        condition(model, DATA, COLLATE)
        digests.add(model.save_pretrained(tmp_path / name))
    assert len(digests) == 1
    assert load_adapter(tmp_path / "a").config.down_bias


def test_what_cannot_be_conditioned_is_refused() -> None:
    for config in ({"down_bias": False}, {"r": 0}):
        with pytest.raises(PedroError, match="needs r above 0 and down_bias true"):
            condition(make(**config), DATA, COLLATE)
    model = make()
    with torch.no_grad():
        model.vector_generators["default"][1].up_proj.weight[0, 0] = 1.0  # type: ignore[index]
    with pytest.raises(PedroError, match="'default' has been trained already"):
        condition(model, DATA, COLLATE)
