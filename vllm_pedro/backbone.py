"""What an adapter has to fit: the backbone's shape, and where models keep their projections."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .errors import PedroError, first_line
from .files import is_int

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TARGET_MODULES: Final = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""The projections that an adapter may scale, in the order in which `PACKED` packs them."""

PACKED: Final = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Packed projections and what they pack, in the order of their outputs: vLLM's of every
architecture, transformers' where `Architecture.is_packed` says so."""

BLOCKS: Final = {
    "qkv_proj": "self_attn",
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "gate_up_proj": "mlp",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}
"""The part of a decoder layer that has each projection."""


@dataclass(frozen=True)
class Architecture:
    """A family of models whose projections are known.

    Attributes:
        model_type: transformers' name of it.
        is_packed: whether transformers packs its projections as `PACKED` says. The order cannot be
            read off a model.
    """

    model_type: str
    is_packed: bool = False


ARCHITECTURES: Final = {
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture("mistral"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma"),
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma3ForCausalLM": Architecture("gemma3_text"),
    "Phi3ForCausalLM": Architecture("phi3", is_packed=True),
}
"""By the class name that transformers and vLLM share. Each is compared with plain transformers in
`tests/integration/test_architectures.py`."""


def is_packed(model_type: str) -> bool:
    """Whether transformers packs the projections of this kind of model."""
    return any(a.is_packed for a in ARCHITECTURES.values() if a.model_type == model_type)


def check_model_folder(model: str | os.PathLike[str]) -> None:
    """Refuse what is no model's folder, before transformers takes it for a name on the hub.

    Raises:
        PedroError: there is no such folder, or no `config.json` in it.
    """
    if not Path(model, "config.json").is_file():
        raise PedroError(
            f"{model}: expected a model's folder with a config.json ('hf download NAME' prints "
            "that of a model on the hub)"
        )


@dataclass(frozen=True)
class BackboneShape:
    """What an adapter has to fit: the widths of the backbone's decoder layers.

    Attributes:
        num_layers: number of decoder layers.
        hidden_size: width d of the residual stream.
        widths: output width of each of the five projections, by name.
    """

    num_layers: int
    hidden_size: int
    widths: Mapping[str, int]

    def __post_init__(self) -> None:
        sizes = {"num_layers": self.num_layers, "hidden_size": self.hidden_size, **self.widths}
        for name, value in sizes.items():
            if not is_int(value) or value < 1:
                raise PedroError(f"backbone shape: {name} must be a positive int, not {value!r}")
        if set(self.widths) != set(TARGET_MODULES):
            raise PedroError(
                f"backbone shape: widths must name {list(TARGET_MODULES)}, "
                f"found {sorted(self.widths)}"
            )

    @classmethod
    def from_hf_config(cls, config: PretrainedConfig) -> BackboneShape:
        """Read the shape off a transformers config (its text part, for multimodal models).

        Raises:
            PedroError: the config lacks a width, or gives one that differs from layer to layer.
        """
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()

        def size(name: str, default: int | None = None) -> int:
            value = getattr(config, name, None)
            if value is None:
                value = default
            if not is_int(value) or value < 1:
                raise PedroError(
                    f"{type(config).__name__}: expected a positive int in '{name}', found "
                    f"{value!r}; PEDRO needs a decoder-only model whose layers are all alike"
                )
            return value

        hidden = size("hidden_size")
        heads = size("num_attention_heads")
        kv_heads = size("num_key_value_heads", heads)
        head_dim = size("head_dim", hidden // heads)
        ffn = size("intermediate_size")
        widths = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, ffn, ffn)
        return cls(
            size("num_hidden_layers"), hidden, dict(zip(TARGET_MODULES, widths, strict=True))
        )

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str]) -> BackboneShape:
        """Read the shape off a model's folder; nothing is downloaded.

        Raises:
            PedroError: it is no model's folder, or see `from_hf_config`.
        """
        from transformers import AutoConfig

        check_model_folder(model)
        try:
            config = AutoConfig.from_pretrained(model, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise PedroError(
                f"{model}: cannot read its config.json: {first_line(error)}"
            ) from error
        return cls.from_hf_config(config)

    def split_widths(self, target_modules: Sequence[str]) -> list[int]:
        """Widths d_t of the parts of l, in the order of `target_modules`."""
        return [self.widths[name] for name in target_modules]
