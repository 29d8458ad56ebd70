"""The table of architectures, and the order in which projections lie."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import transformers
from architectures import plain_classes

from vllm_pedro.architectures import ARCHITECTURES, MODULES, PROJECTIONS, TARGET_MODULES
from vllm_pedro.places import (
    codes_of,
    entries_of,
    grouped,
    modules_of,
    packed,
    permuted,
    transformers_layers,
    transformers_projections,
    widths_of,
)


@pytest.fixture(autouse=True)
def _plain_classes() -> Iterator[None]:
    with plain_classes():
        yield


def test_architectures_are_those_of_transformers() -> None:
    for name, architecture in ARCHITECTURES.items():
        model = getattr(transformers, name)
        assert model.config_class.model_type == architecture.model_type


def test_packed_projections_are_the_targets_in_order() -> None:
    whole = {modules for modules in PROJECTIONS.values() if len(modules) > 1}
    assert {m for modules in whole for m in modules} == set(TARGET_MODULES)
    assert whole == {TARGET_MODULES[:3], TARGET_MODULES[3:]}


def test_codes_say_the_module_and_the_entry() -> None:
    codes = packed({"q_proj": 2, "v_proj": 3})
    assert modules_of(codes).tolist() == [0, 0, 2, 2, 2]
    assert entries_of(codes).tolist() == [0, 1, 0, 1, 2]
    assert widths_of([codes]) == dict.fromkeys(MODULES, 0) | {"q_proj": 2, "v_proj": 3}


def test_projections_by_kv_head_are_as_the_model_takes_them_apart() -> None:
    """What transformers' attention makes of outputs that are numbered."""
    codes = grouped(32, heads=4, kv_heads=2)  # heads of 4
    q, k, v = torch.arange(32).view(2, 4, 4).split([2, 1, 1], dim=1)
    order = np.concatenate([part.flatten().numpy() for part in (q, k, v)])
    assert codes[order].tolist() == packed({"q_proj": 16, "k_proj": 8, "v_proj": 8}).tolist()


def test_permuted_rows_are_those_of_a_weight_that_vllm_permutes() -> None:
    from types import SimpleNamespace

    from vllm.model_executor.models.llama4 import Llama4ForCausalLM

    config = SimpleNamespace(num_attention_heads=3, num_key_value_heads=3)
    weight = torch.arange(24.0)[:, None]
    _, moved = Llama4ForCausalLM.permute_qk_weight_for_rotary(
        SimpleNamespace(config=config), "layers.0.self_attn.q_proj.weight", weight
    )
    codes = permuted(codes_of("q_proj", range(24)), heads=3)
    assert entries_of(codes).tolist() == moved[:, 0].int().tolist()


def test_a_layer_of_transformers() -> None:
    config = transformers.Phi3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        layers = transformers_layers(transformers.Phi3ForCausalLM(config))
    assert layers is not None
    found = transformers_projections(layers[0], config)
    assert [p.path for p in found] == ["self_attn.qkv_proj", "mlp.gate_up_proj"]
    assert [p.modules for p in found] == [TARGET_MODULES[:3], TARGET_MODULES[3:]]
    widths = dict(zip(MODULES, (32, 16, 16, 48, 48, 0), strict=True))
    assert widths_of(p.codes for p in found) == widths
