"""Every supported architecture, as a small random model, against plain transformers."""

from __future__ import annotations

import pytest
import torch
from engines import Oracle

from vllm_pedro import PedroRequest

pytestmark = pytest.mark.engine

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},  # q, k, v with bias; head_dim is hidden_size / heads
    "Qwen3": {},  # norms on q and k, after the projections are scaled
    "Gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "Gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "Gemma3": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "Phi3": {"hidden_size": 128},  # projections fused in the checkpoint
}


def make(name, folder):
    import transformers

    prefix = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **ARCHITECTURES[name]})
    if name == "Qwen2":
        config.hidden_size = 128
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):  # initialised to zero, which would hide an ignored bias
                parameter.normal_(0.0, 0.3)
            elif "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, engine, write_adapter, tmp_path):
    from vllm import SamplingParams

    model = make(name, tmp_path / "model")
    oracle = Oracle(model, keep=4)
    everything = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    adapters = [
        None,
        write_adapter(model, seed=1, scale=0.2, down_scale=15.0),
        write_adapter(
            model, seed=2, scale=0.2, down_scale=15.0, target_modules=everything, pooling="mean"
        ),
    ]
    prompts = [
        [(31 * row + 7 * i * i + 3 * i) % 128 for i in range(5 + 17 * row)] for row in range(6)
    ]
    requests = [
        None if adapters[row % 3] is None else PedroRequest("a", 1, str(adapters[row % 3]))
        for row in range(6)
    ]
    params = SamplingParams(
        temperature=0.0, max_tokens=8, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    with engine(model, skip_tokenizer_init=True, max_num_batched_tokens=128) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": p} for p in prompts],
            params,
            lora_request=requests,
            use_tqdm=False,
        )
    for row, output in enumerate(outputs):
        oracle.check(output, adapters[row % 3])
