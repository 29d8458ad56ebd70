"""What an adapter has to fit: the backbone's shape."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .architectures import MODULES, architecture_of
from .architectures import TARGET_MODULES as TARGET_MODULES
from .errors import PedroError, first_line
from .files import is_int

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BLOCKS: Final = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
}
"""The part of a decoder layer that has each projection, in models of Llama's kind."""


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
        widths: output width of each module, by name; where layers differ, the largest. 0 where no
            layer has it; Up within experts may be left out where there are none.
        layers: each layer's widths; empty where they are all alike.
        is_grouped: whether vLLM may keep Q, K and V of each KV head side by side.
    """

    num_layers: int
    hidden_size: int
    widths: Mapping[str, int]
    layers: tuple[Mapping[str, int], ...] = ()
    is_grouped: bool = False

    def __post_init__(self) -> None:
        sizes = {"num_layers": self.num_layers, "hidden_size": self.hidden_size}
        for name, value in sizes.items():
            if not is_int(value) or value < 1:
                raise PedroError(f"backbone shape: {name} must be a positive int, not {value!r}")
        for widths in (self.widths, *self.layers):
            if not set(TARGET_MODULES) <= set(widths) <= set(MODULES):
                raise PedroError(
                    f"backbone shape: widths must name {list(TARGET_MODULES)}, "
                    f"found {sorted(widths)}"
                )
            for name, value in widths.items():
                if not is_int(value) or value < 0:
                    raise PedroError(f"backbone shape: {name} must be an int, not {value!r}")
        if len(self.layers) not in (0, self.num_layers):
            raise PedroError(
                f"backbone shape: widths of {len(self.layers)} layers, not {self.num_layers}"
            )
        object.__setattr__(self, "widths", _all(self.widths))
        object.__setattr__(self, "layers", tuple(_all(widths) for widths in self.layers))

    @classmethod
    def of_layers(
        cls, hidden_size: int, layers: Sequence[Mapping[str, int]], is_grouped: bool = False
    ) -> BackboneShape:
        """The shape of layers with these widths."""
        widest = {m: max((w.get(m, 0) for w in layers), default=0) for m in MODULES}
        uneven = tuple(layers) if any(_all(w) != widest for w in layers) else ()
        return cls(len(layers), hidden_size, widest, uneven, is_grouped)

    @classmethod
    def from_hf_config(cls, config: PretrainedConfig) -> BackboneShape:
        """The shape of a model with this transformers config (its text part, if multimodal).

        Most configs say the widths. For other architectures of the table it is read off a model
        without weights, which takes a second or two.

        Raises:
            PedroError: the config lacks a width, or gives one that differs from layer to layer.
        """
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        architecture = architecture_of(config)
        if architecture is not None and not architecture.is_even:
            return _shape_on_meta(config, architecture.is_grouped)

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

    def check_modules(self, target_modules: Sequence[str]) -> None:
        """Refuse target modules that no layer has.

        Raises:
            PedroError: names them, and those that there are.
        """
        missing = [name for name in target_modules if not self.widths[name]]
        if missing:
            there = [name for name in MODULES if self.widths[name]]
            raise PedroError(
                f"target_modules: no layer of this backbone has {', '.join(missing)}, only "
                f"{', '.join(there)}"
            )

    def widths_of(self, layer: int) -> Mapping[str, int]:
        """Output width of each module in one layer; 0 where it has none."""
        return self.layers[layer] if self.layers else self.widths

    def split_widths(self, target_modules: Sequence[str], layer: int = 0) -> list[int]:
        """Widths d_t of a layer's parts of l, in the order of `target_modules`."""
        widths = self.widths_of(layer)
        return [widths[name] for name in target_modules]


def _all(widths: Mapping[str, int]) -> dict[str, int]:
    return {module: widths.get(module, 0) for module in MODULES}


_shapes: dict[str, BackboneShape] = {}


def _shape_on_meta(config: PretrainedConfig, is_grouped: bool) -> BackboneShape:
    from .places import widths_on_meta  # takes NumPy

    key = str(config.to_json_string(use_diff=False))
    if key not in _shapes:
        _shapes[key] = BackboneShape.of_layers(*widths_on_meta(config), is_grouped)
    return _shapes[key]
