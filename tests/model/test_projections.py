"""Where transformers models compute Q, K and V, where one projection does it too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from architectures import plain_classes

from vllm_pedro.adapter import init_adapter
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.config import PedroConfig
from vllm_pedro.model import PedroModel, get_pedro_model
from vllm_pedro.places import transformers_layers

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.1, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("self_attn.o_proj", {"num_key_value_heads": 2}),
    "Phi3ForCausalLM": ("self_attn.o_proj", {"num_key_value_heads": 2}),
    "GPTNeoXForCausalLM": ("attention.dense", {}),
    "BloomForCausalLM": ("self_attention.dense", {}),
    "FalconForCausalLM": (
        "self_attention.dense",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    ),
    "GPT2LMHeadModel": ("attn.c_proj", {"n_inner": 48}),
    "DeepseekV2ForCausalLM": (
        "self_attn.o_proj",
        {
            "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": None,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": 8,
            "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1,
            "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1,
            "topk_group": 1,
        },
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _plain_classes() -> Iterator[None]:
    with plain_classes():
        yield


def backbone(name: str) -> Any:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**SIZES, **MODELS[name][1])).eval()


def static(model: Any, modules: list[str], seed: int = 1) -> tuple[PedroModel, dict[str, Any]]:
    """The model with a static adapter, and the adapter's vectors of both layers by module."""
    config = PedroConfig(r=0, target_modules=modules)
    shape = BackboneShape.from_hf_config(model.config)
    adapter = init_adapter(config, shape, seed=seed, scale=0.5)
    vectors = [
        dict(
            zip(
                modules,
                adapter.layer(i).bias.split(shape.split_widths(modules, i)),
                strict=True,
            )
        )
        for i in range(2)
    ]
    pedro = get_pedro_model(model, config)
    pedro.fill_adapter("default", adapter.tensors)
    return pedro, {m: [v[m] for v in vectors] for m in modules}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_scaling_v_is_scaling_what_attention_puts_out(name: str) -> None:
    """All tokens of a sequence have one l_v. That holds whatever the order of V's columns is."""
    model, output = backbone(name), MODELS[name][0]
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    pedro, vectors = static(model, ["v_proj"])
    found, plain = pedro(ids).logits, model(ids).logits
    assert not torch.allclose(found, plain, atol=1e-3)
    layers = transformers_layers(model)
    assert layers is not None
    heads = SIZES["num_attention_heads"]
    for layer, vector in zip(layers, vectors["v_proj"], strict=True):
        module = layer.get_submodule(output)
        width = getattr(module, "in_features", None) or module.weight.shape[0]
        size = width // heads
        own = vector.view(-1, size).repeat_interleave(width // len(vector), dim=0).flatten()
        module.register_forward_pre_hook(lambda m, args, own=own: (args[0] * own, *args[1:]))
    torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "DeepseekV2ForCausalLM"])
@torch.no_grad()
def test_scaling_q_and_k_of_a_head_is_scaling_its_scores(name: str) -> None:
    """l_q and l_k of one value a KV head: half the score's factor from each side is the same."""
    model = backbone(name)
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    shape = BackboneShape.from_hf_config(model.config)
    q, k = shape.split_widths(["q_proj", "k_proj"])
    heads = SIZES["num_attention_heads"]
    groups = k * heads // q
    factors = torch.linspace(0.5, 1.7, groups)
    pedro = get_pedro_model(model, PedroConfig(r=0, target_modules=["q_proj", "k_proj"]))
    results = []
    for of_q, of_k in ((factors, torch.ones(groups)), (torch.ones(groups), factors)):
        bias = torch.cat([of_q.repeat_interleave(q // groups), of_k.repeat_interleave(k // groups)])
        pedro.fill_adapter("default", dict.fromkeys(pedro.adapter_tensors(), bias))
        results.append(pedro(ids).logits)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results[0], model(ids).logits, atol=1e-4)
