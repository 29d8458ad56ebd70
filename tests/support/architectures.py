"""Small random models of every architecture that is served."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

COMMON: dict[str, Any] = {
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
GPT = {"hidden_size": 128, "num_key_value_heads": 4, "n_inner": 96}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": {"sliding_window": 256},
    "Qwen2ForCausalLM": {"hidden_size": 128},  # q, k, v with bias; head_dim is hidden_size / heads
    "Qwen3ForCausalLM": {},  # norms on q and k, after the projections are scaled
    "GemmaForCausalLM": {"hidden_activation": "gelu_pytorch_tanh"},
    "Gemma2ForCausalLM": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "Gemma3ForCausalLM": {"sliding_window": 64, "query_pre_attn_scalar": 32},
    "Phi3ForCausalLM": {"hidden_size": 128},  # projections fused in the checkpoint
    "Glm4ForCausalLM": {},
    "GraniteForCausalLM": {"attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "Ernie4_5ForCausalLM": {},
    "Ministral3ForCausalLM": {},
    "CohereForCausalLM": {"hidden_size": 128, "logit_scale": 0.5},
    "Cohere2ForCausalLM": {"hidden_size": 128, "logit_scale": 0.5, "sliding_window": 128},
    "StableLmForCausalLM": {"hidden_size": 128, "use_qkv_bias": True},
    "Olmo2ForCausalLM": {"hidden_size": 128},
    "Olmo3ForCausalLM": {"hidden_size": 128, "sliding_window": 64},
    "Exaone4ForCausalLM": {"sliding_window": 64},
    "OlmoForCausalLM": {"hidden_size": 128},
    "SmolLM3ForCausalLM": {"hidden_size": 128},
    "SeedOssForCausalLM": {},
    "GlmForCausalLM": {},
    "HunYuanDenseV1ForCausalLM": {},
    "ArceeForCausalLM": {},
    "GPTNeoXForCausalLM": {"num_key_value_heads": 4, "hidden_size": 128},
    "PhiForCausalLM": {"hidden_size": 128},
    "Starcoder2ForCausalLM": {"hidden_size": 128},
    "FalconForCausalLM": {
        "hidden_size": 128,
        "head_dim": None,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "GPT2LMHeadModel": GPT,
    "GPTJForCausalLM": GPT | {"rotary_dim": 8},
    "BloomForCausalLM": {"hidden_size": 128, "n_head": 4, "num_key_value_heads": 4},
    "OPTForCausalLM": {"ffn_dim": 96, "hidden_size": 128, "word_embed_proj_dim": 128},
    "NemotronForCausalLM": {"hidden_size": 128},
    "ApertusForCausalLM": {"hidden_size": 128},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": MOE
    | {"hidden_size": 128, "shared_expert_intermediate_size": 48, "mlp_only_layers": [1]},
    "Qwen3MoeForCausalLM": MOE | {"mlp_only_layers": [1]},
    "OlmoeForCausalLM": MOE | {"hidden_size": 128},
    "GptOssForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64},
    "Glm4MoeForCausalLM": MOE
    | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1},
    "Ernie4_5_MoeForCausalLM": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 48,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_interval": 1,
    },
    "Llama4ForCausalLM": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 80,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 128,
    },
    "GraniteMoeForCausalLM": {"hidden_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeSharedForCausalLM": {
        "hidden_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
    },
    "Gemma4ForCausalLM": {
        "global_head_dim": 64,
        "num_global_key_value_heads": 1,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "vocab_size_per_layer_input": 128,
    },
    "DeepseekV2ForCausalLM": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 64,
        "v_head_dim": 32,
        "head_dim": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "first_k_dense_replace": 1,
        "topk_group": 1,
        "n_group": 1,
        "topk_method": "greedy",
    },
    "GraniteMoeHybridForCausalLM": {
        "hidden_size": 128,
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
    },
    "FalconH1ForCausalLM": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 64,
    },
}
LAST_ENGINE: list[Any] = []


@contextlib.contextmanager
def plain_classes():
    """Models of transformers are made and computed in here, whatever engines have run."""
    if not LAST_ENGINE:
        yield
        return
    from vllm_pedro.integration import options

    with options.plain_classes(LAST_ENGINE[-1]):
        yield


def make(name, folder, **changes):
    import transformers

    model_class = getattr(transformers, name)
    values = {**COMMON, **CONFIGS[name], **changes}
    config = model_class.config_class(**{k: v for k, v in values.items() if v is not None})
    torch.manual_seed(0)
    with plain_classes():
        model = model_class(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Biases are initialised to zero, which would hide one that is ignored.
            if key.endswith("bias") and "correction" not in key:
                parameter.normal_(0.0, 0.3)
            elif "norm" in key or ".ln_" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
