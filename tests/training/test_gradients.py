"""Gradients of every variant against finite differences, in float64."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from tiny_task import make_backbone
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vllm_pedro.adapter import init_adapter
from vllm_pedro.backbone import TARGET_MODULES
from vllm_pedro.config import ACTIVATIONS, INPUT_NORMS, POOLINGS, PedroConfig
from vllm_pedro.model import PedroModel, get_pedro_model

STEP = 1e-6
# Static vectors neither pool nor norm.
VARIANTS = [*itertools.product(POOLINGS, ACTIVATIONS, INPUT_NORMS), ("last", "static", None)]
TARGETS = (("q_proj", "v_proj", "up_proj"), TARGET_MODULES, ("v_proj", "q_proj"))


def rms_norm(module: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    return module.weight * x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()


def make(config: PedroConfig) -> PedroModel:
    backbone = make_backbone(hidden_size=16, intermediate_size=24, head_dim=8, vocab_size=40)
    for module in backbone.modules():
        if isinstance(module, LlamaRMSNorm):
            # transformers' own goes through float32 whatever comes in.
            module.forward = functools.partial(rms_norm, module)
    model = get_pedro_model(backbone, config).double()
    model.fill_adapter("default", init_adapter(config, model.shape, seed=1, scale=0.3).tensors)
    with torch.no_grad():
        for name, parameter in model.adapter_tensors().items():
            if name.endswith("down_proj.weight"):
                parameter *= 10
    return model


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("targets", TARGETS, ids=["q-v-up", "all", "v-q"])
@pytest.mark.parametrize(("pooling", "activation", "norm"), VARIANTS)
def test_gradients_are_those_of_finite_differences(
    pooling: str, activation: str, norm: str | None, targets: tuple[str, ...], packed: bool
) -> None:
    config = PedroConfig(
        r=0 if activation == "static" else 2,
        pooling=pooling,
        activation="gelu" if activation == "static" else activation,
        input_norm=norm,
        down_bias=pooling != "max",
        target_modules=list(targets),
    )
    model = make(config)
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 40, (2, 7), generator=random)
    labels = ids.masked_fill(torch.arange(7) < torch.tensor([[4], [3]]), -100)
    batch = {"input_ids": ids, "labels": labels}
    if packed:
        batch = {name: tensor.view(1, 14) for name, tensor in batch.items()}
        batch["position_ids"] = torch.arange(7).repeat(2)[None]

    def loss() -> torch.Tensor:
        # Not the model's own loss, which is computed in float32.
        logits = model(**batch, use_cache=False).logits
        targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float64 for p in parameters.values())
    found = dict(
        zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True)
    )
    for name, parameter in parameters.items():
        direction = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        with torch.no_grad():
            parameter += STEP * direction
            above = loss()
            parameter -= 2 * STEP * direction
            below = loss()
            parameter += STEP * direction
        want = (above - below) / (2 * STEP)
        got = (found[name] * direction).sum()
        assert torch.isclose(got, want, rtol=1e-5, atol=1e-7), name
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in found.values())
