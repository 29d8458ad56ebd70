"""The table of architectures: which are served and trained, and how they name what is scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

TARGET_MODULES: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""The projections that an adapter may scale, in the order in which packed ones have them."""

EXPERTS_UP: Final = "experts_up_proj"
"""Up within the routed experts of a mixture: one vector, of an expert's width, for all of them."""

MODULES: Final = (*TARGET_MODULES, EXPERTS_UP)
"""All that an adapter may name."""

_QKV, _GATE_UP = TARGET_MODULES[:3], TARGET_MODULES[3:]

PROJECTIONS: Final = {
    f"{block}.{name}" if block else name: modules
    for blocks, names in (
        (
            ("self_attn", "attention", "self_attention", "attn"),
            {
                "qkv_proj": _QKV,
                "query_key_value": _QKV,
                "c_attn": _QKV,
                "q_proj": ("q_proj",),
                "q_b_proj": ("q_proj",),
                "k_proj": ("k_proj",),
                "v_proj": ("v_proj",),
            },
        ),
        (
            (
                "mlp",
                "feed_forward",
                "shared_mlp",
                "mlp.shared_expert",
                "mlp.shared_experts",
                "feed_forward.shared_expert",
                "",
            ),
            {
                "gate_up_proj": _GATE_UP,
                "input_linear": _GATE_UP,
                "w13": _GATE_UP,
                "gate_proj": ("gate_proj",),
                "w1": ("gate_proj",),
                "up_proj": ("up_proj",),
                "w3": ("up_proj",),
                "dense_h_to_4h": ("up_proj",),
                "c_fc": ("up_proj",),
                "fc_in": ("up_proj",),
                "fc1": ("up_proj",),
            },
        ),
    )
    for block in blocks
    for name, modules in names.items()
}
"""Paths of modules in a decoder layer, transformers' and vLLM's, with the projections that each
computes, in the order of its outputs. In an MLP without a gate, Up is what its activation reads; in
a mixture of experts, the shared one's."""

LATENT_VALUE: Final = "self_attn.o_proj"
"""Path of the module whose input is scaled by l_v in multi-head latent attention, where V is never
computed: all tokens of a sequence have one l_v, so that scaling V is scaling attention's output."""

EXPERTS: Final = ("mlp.experts", "block_sparse_moe.experts")
"""Paths of the routed experts in a decoder layer, transformers' and vLLM's."""

LAYER_LISTS: Final = ("layers", "h", "blocks")
"""What models call the list of their decoder layers."""


@dataclass(frozen=True)
class Architecture:
    """A family of models whose projections are known.

    Attributes:
        model_type: transformers' name of it.
        is_grouped: whether transformers' packed projection holds, for each KV head, its queries,
            then K, then V. Otherwise it holds all queries, all K, all V. The order cannot be read
            off a model.
        is_even: whether the config says the widths, as Llama's does; otherwise they are read off
            a model without weights.
        is_permuted: whether vLLM permutes the rows of Q and K as it loads them.
        has_input_norm: whether each layer normalises its input first.
        is_latent: whether attention is multi-head latent attention, which has no K of its own and
            whose V is scaled where it comes out.
        has_experts: whether it may have routed experts that compute act(gate) * up, from weights
            that transformers keeps as one parameter, gate above up. gpt-oss computes another
            function; Llama 4 weighs what its experts read.
    """

    model_type: str
    is_grouped: bool = False
    is_even: bool = False
    is_permuted: bool = False
    has_input_norm: bool = True
    is_latent: bool = False
    has_experts: bool = False


def _even(model_type: str, **others: bool) -> Architecture:
    return Architecture(model_type, is_even=True, **others)


def _mixture(model_type: str, **others: bool) -> Architecture:
    return Architecture(model_type, has_experts=True, **others)


ARCHITECTURES: Final = {
    # A norm that adds the residual, packed projections.
    "LlamaForCausalLM": _even("llama"),
    "MistralForCausalLM": _even("mistral"),
    "Ministral3ForCausalLM": _even("ministral3"),
    "Qwen2ForCausalLM": _even("qwen2"),
    "Qwen3ForCausalLM": _even("qwen3"),
    "GemmaForCausalLM": _even("gemma"),
    "Gemma2ForCausalLM": _even("gemma2"),
    "Gemma3ForCausalLM": _even("gemma3_text"),
    "Phi3ForCausalLM": _even("phi3"),
    "Glm4ForCausalLM": _even("glm4"),
    "GraniteForCausalLM": _even("granite"),
    "Ernie4_5ForCausalLM": _even("ernie4_5"),
    # Attention and MLP side by side, or norms that add nothing.
    "CohereForCausalLM": _even("cohere"),
    "Cohere2ForCausalLM": _even("cohere2"),
    "StableLmForCausalLM": _even("stablelm"),
    # Norms after the blocks.
    "Olmo2ForCausalLM": _even("olmo2", has_input_norm=False),
    "Olmo3ForCausalLM": _even("olmo3", has_input_norm=False),
    "Exaone4ForCausalLM": _even("exaone4", has_input_norm=False),
    # vLLM's Transformers backend.
    "OlmoForCausalLM": _even("olmo"),
    "SmolLM3ForCausalLM": _even("smollm3"),
    "SeedOssForCausalLM": _even("seed_oss"),
    "GlmForCausalLM": _even("glm"),
    "HunYuanDenseV1ForCausalLM": _even("hunyuan_v1_dense"),
    # MLPs without a gate.
    "ArceeForCausalLM": Architecture("arcee"),
    "GPTNeoXForCausalLM": Architecture("gpt_neox", is_grouped=True),
    "PhiForCausalLM": Architecture("phi"),
    "Starcoder2ForCausalLM": Architecture("starcoder2"),
    "FalconForCausalLM": Architecture("falcon", is_grouped=True),
    "GPT2LMHeadModel": Architecture("gpt2"),
    "GPTJForCausalLM": Architecture("gptj"),
    "BloomForCausalLM": Architecture("bloom", is_grouped=True),
    "OPTForCausalLM": Architecture("opt"),
    "NemotronForCausalLM": Architecture("nemotron"),
    "ApertusForCausalLM": Architecture("apertus"),
    # Mixtures of experts.
    "MixtralForCausalLM": _mixture("mixtral"),
    "Qwen2MoeForCausalLM": _mixture("qwen2_moe"),
    "Qwen3MoeForCausalLM": _mixture("qwen3_moe"),
    "OlmoeForCausalLM": _mixture("olmoe"),
    "GptOssForCausalLM": Architecture("gpt_oss"),
    "Glm4MoeForCausalLM": _mixture("glm4_moe"),
    "Ernie4_5_MoeForCausalLM": _mixture("ernie4_5_moe"),
    "Llama4ForCausalLM": Architecture("llama4_text", is_permuted=True),
    "GraniteMoeForCausalLM": _mixture("granitemoe"),
    "GraniteMoeSharedForCausalLM": _mixture("granitemoeshared"),
    # Layers of different widths.
    "Gemma4ForCausalLM": Architecture("gemma4_text"),
    # Multi-head latent attention.
    "DeepseekV2ForCausalLM": _mixture("deepseek_v2", is_latent=True),
    # Hybrids: some layers have no attention.
    "GraniteMoeHybridForCausalLM": Architecture("granitemoehybrid"),
    "FalconH1ForCausalLM": Architecture("falcon_h1"),
}
"""By the class name that transformers and vLLM share. Each is compared with plain transformers in
`tests/integration/test_architectures.py`."""


MULTIMODAL: Final = {
    "Mistral3ForConditionalGeneration": "mistral",
    "Gemma3ForConditionalGeneration": "gemma3_text",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl_text",
}
"""Models that see, with the language model that they ran with; others of the table fit, too. Its
layers are scaled, the tower's are not. Each is compared with plain transformers in
`tests/integration/multimodal.py`."""

_TEXT_PARTS: Final = (_even("qwen2_5_vl_text"),)
"""Language models that there are within models that see alone."""


def architecture_of(config: Any) -> Architecture | None:
    """The table's entry for a config of transformers'."""
    model_type = getattr(config, "model_type", None)
    known = (*ARCHITECTURES.values(), *_TEXT_PARTS)
    return next((a for a in known if a.model_type == model_type), None)
