"""Draft models and heads: they propose, and the target verifies under each row's own vectors."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from architectures import make
from engines import Oracle
from runners import current_runner
from safetensors.torch import load_file, save_file

from vllm_pedro import PedroRequest

pytestmark = pytest.mark.engine

LOOP = [5, 17, 40, 8, 99, 61] * 8


def random(shapes):
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(shape) if len(shape) == 1 else 0.2 * torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
    }


def block(prefix, config, width=1):
    """Shapes of a Llama block whose attention reads so many times the hidden size."""
    d, f, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    return {
        f"{prefix}self_attn.q_proj.weight": (q, width * d),
        f"{prefix}self_attn.k_proj.weight": (kv, width * d),
        f"{prefix}self_attn.v_proj.weight": (kv, width * d),
        f"{prefix}self_attn.o_proj.weight": (d, q),
        f"{prefix}mlp.gate_proj.weight": (f, d),
        f"{prefix}mlp.up_proj.weight": (f, d),
        f"{prefix}mlp.down_proj.weight": (d, f),
        f"{prefix}post_attention_layernorm.weight": (d,),
    }


def draft_model(model, folder):
    return shutil.copytree(model, folder / "draft")


def head(model, folder, shapes, **changes):
    """A random head for a model."""
    folder.mkdir(exist_ok=True)
    config = json.loads((model / "config.json").read_text()) | {"num_hidden_layers": 1} | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(random(shapes(config)), folder / "model.safetensors")
    return folder


def eagle(model, folder):
    def shapes(config):
        d = config["hidden_size"]
        return {"fc.weight": (d, 2 * d), **block("layers.0.", config)}

    return head(model, folder / "eagle", shapes)


def eagle3(model, folder):
    """It reads the residual stream in the midst of the target, scaled as it is."""

    def shapes(config):
        d, vocabulary = config["hidden_size"], config["vocab_size"]
        norms = {f"midlayer.{name}.weight": (d,) for name in ("input_layernorm", "hidden_norm")}
        return {
            "fc.weight": (d, 3 * d),
            "norm.weight": (d,),
            "lm_head.weight": (vocabulary, d),
            **norms,
            **block("midlayer.", config, 2),
        }

    return head(model, folder / "eagle3", shapes, architectures=["LlamaForCausalLMEagle3"])


def medusa(model, folder):
    def shapes(config):
        d, vocabulary = config["hidden_size"], config["vocab_size"]
        blocks = {f"blocks.{i}.layers.0.weight": (d, d) for i in range(3)}
        return blocks | {f"lm_heads.{i}.weight": (vocabulary, d) for i in range(3)}

    config = json.loads((model / "config.json").read_text())
    made = head(model, folder / "medusa", shapes)
    own = {"architectures": ["MedusaModel"], "model_type": "medusa", "num_heads": 3}
    own |= {"num_hidden_layers": 1, **{k: config[k] for k in ("hidden_size", "vocab_size")}}
    (made / "config.json").write_text(json.dumps(own))
    return made


def with_predictor(folder):
    """A model whose checkpoint has a block for multi-token prediction."""
    model = make("Ernie4_5_MoeForCausalLM", folder / "ernie")
    config = json.loads((model / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    d = config["hidden_size"]
    more = random(
        {
            "model.mtp_emb_norm.0.weight": (d,),
            "model.mtp_hidden_norm.0.weight": (d,),
            "model.mtp_linear_proj.0.weight": (d, 2 * d),
            "model.mtp_block.0.input_layernorm.weight": (d,),
            **block("model.mtp_block.0.", config),
        }
    )
    weights = load_file(model / "model.safetensors")
    save_file(weights | more, model / "model.safetensors", {"format": "pt"})
    return model


DRAFTS = {"draft_model": draft_model, "eagle": eagle, "eagle3": eagle3, "medusa": medusa}
V1_ONLY = {"medusa", "eagle"}
"""V2 has no Medusa, and EAGLE shares its code with EAGLE-3."""


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method in V1_ONLY else pytest.mark.both_runners)
        for method in (*DRAFTS, "mtp")
    ],
)
def test_drafts_are_verified_under_the_rows_own_vectors(
    method, tiny, engine, write_adapter, tmp_path
):
    from vllm import SamplingParams

    model = with_predictor(tmp_path) if method == "mtp" else tiny
    drafts = {} if method == "mtp" else {"model": str(DRAFTS[method](tiny, tmp_path))}
    oracle = Oracle(model, keep=5)
    adapters = [
        None,
        *(
            write_adapter(model, seed=seed, scale=scale, down_scale=15.0, **config)
            for seed, scale, config in (
                (1, 0.2, {}), (2, 0.2, {"pooling": "mean"}), (3, 0.2, {"scope": "answer"}),
                (4, 0.01, {}),
            )
        ),
    ]  # fmt: skip
    params = SamplingParams(
        temperature=0.0, max_tokens=20 if current_runner() == "v1" else 10, ignore_eos=True,
        detokenize=False, prompt_logprobs=0,
    )  # fmt: skip
    count = 1 if method == "mtp" else 3
    with engine(
        model, skip_tokenizer_init=True, block_size=32, enable_prefix_caching=True,
        speculative_config={"method": method, **drafts, "num_speculative_tokens": count},
        disable_log_stats=False, max_num_seqs=4,
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
                oracle.check(output, path)
        counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    assert counts["vllm:spec_decode_num_draft_tokens"] > 0
    if method == "draft_model":  # a random head is right by chance alone
        assert counts["vllm:spec_decode_num_accepted_tokens"] > 10
