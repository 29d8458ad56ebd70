"""The backbone's shape, and the table of architectures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import transformers

from vllm_pedro import config
from vllm_pedro.architectures import EXPERTS_UP
from vllm_pedro.backbone import TARGET_MODULES, BackboneShape
from vllm_pedro.errors import PedroError


def test_shape_with_grouped_queries_and_head_dim() -> None:
    config = transformers.Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
    )
    shape = BackboneShape.from_hf_config(config)
    assert shape == BackboneShape(
        3, 64, {"q_proj": 128, "k_proj": 32, "v_proj": 32, "gate_proj": 96, "up_proj": 96}
    )
    assert shape.split_widths(["up_proj", "q_proj"]) == [96, 128]


def test_shape_without_head_dim_or_groups() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    config.head_dim = None
    shape = BackboneShape.from_hf_config(config)
    assert shape.split_widths(TARGET_MODULES) == [64, 64, 64, 96, 96]


def test_shape_of_a_multimodal_config_is_its_texts() -> None:
    config = transformers.Gemma3Config(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        }
    )
    assert BackboneShape.from_hf_config(config).split_widths(TARGET_MODULES) == [16, 8, 8, 48, 48]


def test_shape_refuses_what_it_cannot_read() -> None:
    with pytest.raises(PedroError, match=r"MambaConfig.*'num_attention_heads'"):
        BackboneShape.from_hf_config(transformers.MambaConfig())
    with pytest.raises(PedroError, match="widths must name"):
        BackboneShape(1, 8, {"q_proj": 8})
    with pytest.raises(PedroError, match="num_layers must be a positive int, not 0"):
        BackboneShape(0, 8, dict.fromkeys(TARGET_MODULES, 8))


def test_shape_of_layers_that_differ() -> None:
    one = dict.fromkeys(TARGET_MODULES, 8)
    other = one | {"q_proj": 16, "gate_proj": 0}
    even = BackboneShape.of_layers(4, [one, one])
    assert even == BackboneShape(2, 4, one)
    shape = BackboneShape.of_layers(4, [one, other])
    assert shape.widths == one | {"q_proj": 16, EXPERTS_UP: 0}
    assert shape.split_widths(["gate_proj", "q_proj"], 1) == [0, 16]
    with pytest.raises(PedroError, match="widths of 1 layers, not 2"):
        BackboneShape(2, 4, one, (one,))


def test_shape_of_a_folder(tmp_path: Path) -> None:
    made = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    made.save_pretrained(tmp_path)
    assert BackboneShape.from_pretrained(tmp_path) == BackboneShape.from_hf_config(made)
    with pytest.raises(PedroError, match=r"expected a model's folder with a config\.json"):
        BackboneShape.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(PedroError, match=r"cannot read its config\.json: "):
        BackboneShape.from_pretrained(tmp_path)


def test_config_has_the_names_that_were_there() -> None:
    assert config.TARGET_MODULES is TARGET_MODULES
    assert config.BackboneShape is BackboneShape


@pytest.mark.parametrize("kind", ["Glm4Moe", "Gemma4Text"])
def test_a_large_model_is_read_without_weights_in_little_time(kind: str) -> None:
    """80 layers, the widths and experts of the largest that there are."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    sizes |= {"num_hidden_layers": 80, "num_key_value_heads": 8, "head_dim": 128}
    experts = {"n_routed_experts": 256, "moe_intermediate_size": 2048}
    config = getattr(transformers, f"{kind}Config")(**sizes, **(experts if "Moe" in kind else {}))
    start = time.process_time()  # of this process, however busy the machine is
    shape = BackboneShape.from_hf_config(config)
    assert time.process_time() - start < 2
    assert shape.num_layers == len(shape.layers) == 80
