"""Draft models and EAGLE: they propose, and the target verifies under each row's own vectors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from vllm_pedro import PedroRequest

pytestmark = pytest.mark.engine

LOOP = [5, 17, 40, 8, 99, 61] * 8


@pytest.fixture(scope="module")
def eagle(tiny, tmp_path_factory):
    """A random EAGLE head of one layer for the tiny model."""
    folder = tmp_path_factory.mktemp("eagle")
    config = json.loads((tiny / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    d, f, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    kv = config["num_key_value_heads"] * head
    shapes = {
        "fc.weight": (d, 2 * d),
        "layers.0.self_attn.q_proj.weight": (config["num_attention_heads"] * head, d),
        "layers.0.self_attn.k_proj.weight": (kv, d),
        "layers.0.self_attn.v_proj.weight": (kv, d),
        "layers.0.self_attn.o_proj.weight": (d, config["num_attention_heads"] * head),
        "layers.0.mlp.gate_proj.weight": (f, d),
        "layers.0.mlp.up_proj.weight": (f, d),
        "layers.0.mlp.down_proj.weight": (d, f),
    }
    draw = torch.Generator().manual_seed(0)
    weights = {name: 0.2 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(d)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_drafts_are_verified_under_the_rows_own_vectors(
    method, tiny, eagle, tiny_engine, tiny_oracle, write_adapter, tmp_path
):
    from vllm import SamplingParams

    draft = eagle if method == "eagle" else shutil.copytree(tiny, tmp_path / "draft")
    adapters = [
        None,
        *(
            write_adapter(tiny, seed=seed, scale=scale, down_scale=15.0, **config)
            for seed, scale, config in (
                (1, 0.2, {}), (2, 0.2, {"pooling": "mean"}), (3, 0.2, {"scope": "answer"}),
                (4, 0.01, {}),
            )
        ),
    ]  # fmt: skip
    params = SamplingParams(
        temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False, prompt_logprobs=0
    )
    with tiny_engine(
        speculative_config={"method": method, "model": str(draft), "num_speculative_tokens": 3},
        enable_prefix_caching=True, disable_log_stats=False, max_num_seqs=4,
    ) as llm:  # fmt: skip
        for turn in range(2):  # the second finds the first's blocks
            asked = [
                (LOOP[: 40 + turn], path, path and PedroRequest("a", i + 1, str(path)))
                for i, path in enumerate(adapters)
            ]
            outputs = llm.generate(
                [{"prompt_token_ids": prompt} for prompt, _, _ in asked],
                params, lora_request=[request for _, _, request in asked], use_tqdm=False,
            )  # fmt: skip
            for output, (_, path, _) in zip(outputs, asked, strict=True):
                tiny_oracle.check(output, path)
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0
    if method == "draft_model":  # a random head is right by chance alone
        assert counts["vllm:spec_decode_num_accepted_tokens"] > 20
