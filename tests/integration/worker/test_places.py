"""Where a loaded model computes what is scaled, on modules of vLLM's form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig

from vllm_pedro.architectures import TARGET_MODULES
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.integration.worker.places import find_places
from vllm_pedro.places import codes_of, grouped

CONFIG = LlamaConfig()


class Projection(nn.Module):
    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.__dict__.update(sizes)


def share(rank: int, size: int, gathers: bool = False) -> dict[str, Any]:
    """Attributes of a projection whose outputs ranks share."""
    return {
        "tp_rank": rank,
        "tp_size": size,
        "gather_output": gathers,
        "output_size_per_partition": None,
    }


def qkv(rank: int, size: int, kv_heads: int) -> Projection:
    return Projection(
        total_num_heads=4,
        total_num_kv_heads=kv_heads,
        head_size=2,
        v_head_size=2,
        **share(rank, size),
        num_kv_head_replicas=max(1, size // kv_heads),
    )


def model(*layers: dict[str, nn.Module]) -> nn.Module:
    whole = nn.Module()
    whole.layers = nn.ModuleList()
    for modules in layers:
        layer = nn.Module()
        for path, module in modules.items():
            block, _, name = path.rpartition(".")
            if not hasattr(layer, block):
                layer.add_module(block, nn.Module())
            layer.get_submodule(block).add_module(name, module)
        whole.layers.append(layer)
    return whole


def shape(layers: int = 1, **widths: int) -> BackboneShape:
    return BackboneShape(layers, 8, dict.fromkeys(TARGET_MODULES, 0) | widths)


def codes(**entries: Any) -> list[int]:
    return np.concatenate([codes_of(m, e) for m, e in entries.items()]).tolist()


@pytest.mark.parametrize(
    ("kv_heads", "rank", "expected"),
    [
        (2, 0, codes(q_proj=range(4), k_proj=range(2), v_proj=range(2))),
        (2, 1, codes(q_proj=range(4, 8), k_proj=range(2, 4), v_proj=range(2, 4))),
        (1, 1, codes(q_proj=range(4, 8), k_proj=range(2), v_proj=range(2))),
    ],
)
def test_a_rank_has_its_heads_and_their_kv_heads(
    kv_heads: int, rank: int, expected: list[int]
) -> None:
    widths = {"q_proj": 8, "k_proj": 2 * kv_heads, "v_proj": 2 * kv_heads}
    found = find_places(
        model({"self_attn.qkv_proj": qkv(rank, 2, kv_heads)}), CONFIG, shape(**widths),
        ("q_proj", "v_proj"),
    )  # fmt: skip
    assert found[0].codes.tolist() == expected


def test_gate_and_up_are_shared_out_one_by_one_unless_gathered() -> None:
    for gathers, expected in (
        (False, codes(gate_proj=range(3, 6), up_proj=range(3, 6))),
        (True, codes(gate_proj=range(6), up_proj=range(6))),
    ):
        projection = Projection(output_sizes=[6, 6], **share(1, 2, gathers))
        found = find_places(
            model({"mlp.gate_up_proj": projection}), CONFIG, shape(gate_proj=6, up_proj=6),
            TARGET_MODULES,
        )  # fmt: skip
        assert found[0].codes.tolist() == expected


def test_a_rank_of_a_projection_by_kv_head_has_whole_heads() -> None:
    config = GPTNeoXConfig(num_attention_heads=4, hidden_size=8)
    for rank in (0, 1):
        projection = Projection(output_size=24, **share(rank, 2))
        found = find_places(
            model({"attention.query_key_value": projection}), config,
            shape(q_proj=8, k_proj=8, v_proj=8), TARGET_MODULES,
        )  # fmt: skip
        assert found[0].codes.tolist() == grouped(24, 4, 4)[12 * rank : 12 * rank + 12].tolist()


def test_a_replicated_projection_is_whole_on_every_rank() -> None:
    projection = Projection(output_size=6, tp_rank=1, tp_size=2)
    found = find_places(model({"mlp.up_proj": projection}), CONFIG, shape(up_proj=6), ("up_proj",))
    assert found[0].codes.tolist() == codes(up_proj=range(6))


def test_layers_of_other_stages_are_left_out() -> None:
    from vllm.model_executor.models.utils import PPMissingLayer

    whole = model({"mlp.up_proj": Projection(output_size=6)})
    whole.layers.insert(0, PPMissingLayer())
    found = find_places(whole, CONFIG, shape(2, up_proj=6), ("up_proj",))
    assert [layer.index for layer in found] == [1]


def test_a_tower_of_as_many_layers_is_passed_over() -> None:
    whole: Any = nn.Module()
    whole.tower, whole.decoder = (
        model({"mlp.up_proj": Projection(output_size=6)}) for _ in range(2)
    )
    whole.get_language_model = lambda: whole.decoder
    (found,) = find_places(whole, CONFIG, shape(up_proj=6), ("up_proj",))
    assert found.layer is whole.decoder.layers[0]


def test_widths_that_do_not_fit_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"layer 0 .*'up_proj': 6.*expected .*'up_proj': 7"):
        find_places(
            model({"mlp.up_proj": Projection(output_size=6)}),
            CONFIG,
            shape(up_proj=7),
            ("up_proj",),
        )
    with pytest.raises(ValueError, match="Linear has no 1 decoder layers"):
        find_places(nn.Linear(2, 2), CONFIG, shape(up_proj=7), ("up_proj",))
