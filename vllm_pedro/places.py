"""Where models compute what is scaled, output by output, and what finds it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .architectures import (
    EXPERTS,
    EXPERTS_UP,
    LATENT_VALUE,
    LAYER_LISTS,
    MODULES,
    PROJECTIONS,
    architecture_of,
)

if TYPE_CHECKING:
    from torch import nn

Codes = npt.NDArray[np.int64]
"""`[columns]`: for each output of a projection the module and the entry of the module's vector that
it is scaled by."""

_MODULE_BITS = 32


def codes_of(module: str, entries: Iterable[int] | range | npt.NDArray[np.integer]) -> Codes:
    """Codes of some entries of a module's vector."""
    first = MODULES.index(module) << _MODULE_BITS
    if isinstance(entries, range):
        return np.arange(entries.start, entries.stop, entries.step, dtype=np.int64) + first
    return np.asarray(entries, np.int64) + first


def modules_of(codes: Codes) -> Codes:
    """The number of each code's module in `MODULES`."""
    return codes >> _MODULE_BITS


def entries_of(codes: Codes) -> Codes:
    """The entry of its module's vector that each code stands for."""
    return codes & ((1 << _MODULE_BITS) - 1)


def widths_of(projections: Iterable[Codes]) -> dict[str, int]:
    """Width of each module, where these codes are all of a layer's."""
    widths = dict.fromkeys(MODULES, 0)
    for codes in projections:
        for number in np.unique(modules_of(codes)):
            widths[MODULES[number]] += int((modules_of(codes) == number).sum())
    return widths


def packed(widths: Mapping[str, int]) -> Codes:
    """Codes of a projection that packs whole modules, one after the other."""
    return np.concatenate([codes_of(module, range(width)) for module, width in widths.items()])


def scaled_range(codes: Codes, modules: Iterable[str]) -> slice:
    """The outputs of a projection that are scaled for some modules: one range, so that K is in it
    where it lies between Q and V. Empty where the projection has none of them."""
    numbers = [MODULES.index(module) for module in modules]
    held = np.flatnonzero(np.isin(modules_of(codes), numbers))
    return slice(int(held[0]), int(held[-1]) + 1) if len(held) else slice(0, 0)


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
    """A module of a decoder layer that computes some of what is scaled.

    Attributes:
        path: where it is in the layer.
        codes: of its outputs; where it is routed experts, of what each computes within.
        is_input: the codes are of its inputs, which are scaled.
    """

    path: str
    codes: Codes
    is_input: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """What it computes, in canonical order."""
        return tuple(MODULES[number] for number in np.unique(modules_of(self.codes)))

    @property
    def is_experts(self) -> bool:
        """Whether it is routed experts."""
        return self.modules == (EXPERTS_UP,)


def submodule(layer: nn.Module, path: str) -> nn.Module | None:
    """A submodule by its path, if there is one."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def find_projections(
    layer: nn.Module, config: Any, codes: Callable[[nn.Module, tuple[str, ...], bool], Codes | None]
) -> list[Projection]:
    """A decoder layer's projections; each module comes from the first path that has it.

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
    if architecture is not None and architecture.has_experts:
        paths |= dict.fromkeys(EXPERTS, (EXPERTS_UP,))
    found, missing = [], set(MODULES)
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
        if modules == (EXPERTS_UP,):
            return codes_of(EXPERTS_UP, range(module.gate_up_proj.shape[1] // 2))  # type: ignore[index]
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
