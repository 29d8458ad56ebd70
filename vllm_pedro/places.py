"""Where models compute the five projections: the table of architectures, and what finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import nn

TARGET_MODULES: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""The projections that an adapter may scale, in the order in which packed ones have them."""

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
    """

    model_type: str
    is_grouped: bool = False
    is_even: bool = False
    is_permuted: bool = False
    has_input_norm: bool = True
    is_latent: bool = False


def _even(model_type: str, **others: bool) -> Architecture:
    return Architecture(model_type, is_even=True, **others)


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
    # Mixtures of experts: attention, and what is dense.
    "MixtralForCausalLM": Architecture("mixtral"),
    "Qwen2MoeForCausalLM": Architecture("qwen2_moe"),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe"),
    "OlmoeForCausalLM": Architecture("olmoe"),
    "GptOssForCausalLM": Architecture("gpt_oss"),
    "Glm4MoeForCausalLM": Architecture("glm4_moe"),
    "Ernie4_5_MoeForCausalLM": Architecture("ernie4_5_moe"),
    "Llama4ForCausalLM": Architecture("llama4_text", is_permuted=True),
    "GraniteMoeForCausalLM": Architecture("granitemoe"),
    "GraniteMoeSharedForCausalLM": Architecture("granitemoeshared"),
    # Layers of different widths.
    "Gemma4ForCausalLM": Architecture("gemma4_text"),
    # Multi-head latent attention.
    "DeepseekV2ForCausalLM": Architecture("deepseek_v2", is_latent=True),
    # Hybrids: some layers have no attention.
    "GraniteMoeHybridForCausalLM": Architecture("granitemoehybrid"),
    "FalconH1ForCausalLM": Architecture("falcon_h1"),
}
"""By the class name that transformers and vLLM share. Each is compared with plain transformers in
`tests/integration/test_architectures.py`."""

Codes = npt.NDArray[np.int64]
"""`[columns]`: for each output of a projection the module and the entry of the module's vector that
it is scaled by."""

_MODULE_BITS = 32


def codes_of(module: str, entries: Iterable[int] | range | npt.NDArray[np.integer]) -> Codes:
    """Codes of some entries of a module's vector."""
    first = TARGET_MODULES.index(module) << _MODULE_BITS
    if isinstance(entries, range):
        return np.arange(entries.start, entries.stop, entries.step, dtype=np.int64) + first
    return np.asarray(entries, np.int64) + first


def modules_of(codes: Codes) -> Codes:
    """The number of each code's module in `TARGET_MODULES`."""
    return codes >> _MODULE_BITS


def entries_of(codes: Codes) -> Codes:
    """The entry of its module's vector that each code stands for."""
    return codes & ((1 << _MODULE_BITS) - 1)


def widths_of(projections: Iterable[Codes]) -> dict[str, int]:
    """Width of each of the five projections, where these codes are all of a layer's."""
    widths = dict.fromkeys(TARGET_MODULES, 0)
    for codes in projections:
        for number in np.unique(modules_of(codes)):
            widths[TARGET_MODULES[number]] += int((modules_of(codes) == number).sum())
    return widths


def packed(widths: Mapping[str, int]) -> Codes:
    """Codes of a projection that packs whole modules, one after the other."""
    return np.concatenate([codes_of(module, range(width)) for module, width in widths.items()])


def grouped(width: int, heads: int, kv_heads: int) -> Codes:
    """Codes of a projection that packs Q, K and V by KV head.

    Args:
        width: All outputs.
        heads: Query heads.
        kv_heads: KV heads.
    """
    size, queries = width // (heads + 2 * kv_heads), heads // kv_heads
    per_head = {"q_proj": queries * size, "k_proj": size, "v_proj": size}
    return np.concatenate(
        [
            codes_of(module, range(head * each, (head + 1) * each))
            for head in range(kv_heads)
            for module, each in per_head.items()
        ]
    )


def permuted(codes: Codes, heads: int) -> Codes:
    """Codes of Q or K whose rows are reordered for rotary embeddings of neighbouring pairs."""
    return codes.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


@dataclass(frozen=True)
class Projection:
    """A module of a decoder layer that computes some of the five projections.

    Attributes:
        path: where it is in the layer.
        codes: of its outputs.
        is_input: the codes are of its inputs, which are scaled.
    """

    path: str
    codes: Codes
    is_input: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """What it computes, in canonical order."""
        return tuple(TARGET_MODULES[number] for number in np.unique(modules_of(self.codes)))


def submodule(layer: nn.Module, path: str) -> nn.Module | None:
    """A submodule by its path, if there is one."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def find_projections(
    layer: nn.Module, config: Any, codes: Callable[[nn.Module, tuple[str, ...], bool], Codes | None]
) -> list[Projection]:
    """A decoder layer's projections; each of the five comes from the first path that has it.

    Args:
        layer: transformers' or vLLM's.
        config: transformers', of the model's text part.
        codes: what says a module's codes, given the projections it computes, and whether those of
            its inputs are asked for; None if it is no projection.
    """
    architecture = architecture_of(config)
    is_latent = architecture is not None and architecture.is_latent
    paths: dict[str, tuple[str, ...]] = dict(PROJECTIONS)
    if is_latent:
        paths[LATENT_VALUE] = ("v_proj",)
    found, missing = [], set(TARGET_MODULES)
    for path, modules in paths.items():
        module = submodule(layer, path)
        if module is None or not missing.issuperset(modules):
            continue
        is_input = is_latent and path == LATENT_VALUE
        own = codes(module, modules, is_input)
        if own is not None:
            found.append(Projection(path, own, is_input))
            missing.difference_update(modules)
    return found


def layer_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists in a model that are called as lists of decoder layers are."""
    from torch import nn

    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and name.rpartition(".")[2] in LAYER_LISTS
        and len(module)
    ]


def _heads(config: Any) -> tuple[int, int]:
    """Query and KV heads of a config of transformers'."""
    heads = config.num_attention_heads
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return heads, 1
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None)
    return heads, kv_heads or heads


def architecture_of(config: Any) -> Architecture | None:
    """The table's entry for a config of transformers'."""
    model_type = getattr(config, "model_type", None)
    return next((a for a in ARCHITECTURES.values() if a.model_type == model_type), None)


def fused_qkv(width: int, config: Any) -> Codes:
    """Codes of a projection of transformers' that computes Q, K and V.

    Args:
        width: all its outputs.
        config: the model's, of its text part.
    """
    architecture, (heads, kv_heads) = architecture_of(config), _heads(config)
    if architecture is not None and architecture.is_grouped:
        return grouped(width, heads, kv_heads)
    size = width // (heads + 2 * kv_heads)
    return packed({"q_proj": heads * size, "k_proj": kv_heads * size, "v_proj": kv_heads * size})


def transformers_layers(model: Any) -> nn.ModuleList | None:
    """The decoder layers of a transformers model, or None where they are not found."""
    from torch import nn

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for part in (decoder, getattr(model, "model", None)):  # Llama 4's decoder is the model
        for name in LAYER_LISTS:
            layers = getattr(part, name, None)
            if isinstance(layers, nn.ModuleList) and len(layers):
                return layers
    return None


def transformers_projections(layer: nn.Module, config: Any) -> list[Projection]:
    """The projections of a decoder layer of transformers'.

    Args:
        layer: the layer.
        config: the model's config, of its text part.
    """

    def codes(module: nn.Module, modules: tuple[str, ...], of_input: bool) -> Codes | None:
        if of_input:
            return codes_of(modules[0], range(module.in_features))  # type: ignore[arg-type]
        width = getattr(module, "out_features", getattr(module, "nf", None))
        if width is None:
            return None
        if len(modules) == 1:
            return codes_of(modules[0], range(width))
        if architecture_of(config) is None:
            return None  # the order cannot be read off a model
        if len(modules) == 2:
            return packed(dict.fromkeys(modules, width // 2))
        return fused_qkv(width, config)

    return find_projections(layer, config, codes)


def widths_on_meta(config: Any) -> tuple[int, Sequence[dict[str, int]]]:
    """Hidden size, and each layer's widths, from a model without weights.

    Args:
        config: transformers', of the text part.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = transformers_layers(model) or ()
    return config.hidden_size, [
        widths_of(p.codes for p in transformers_projections(layer, config)) for layer in layers
    ]
