"""The hooks that let adapters act in a backbone, whoever holds the adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backbone import BackboneShape
from ..config import PedroConfig
from ..errors import PedroError
from ..files import shorten
from .cache import PromptVectors
from .hooks import PASS_KEY, LayerHooks, Pass
from .projections import decoder_layers, find_projections
from .prompts import (
    Prompts,
    packed_sequences,
    readers_from_pooled_token,
    tokens_before_labels,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_KEYS = ("prompt_lengths", "prompt_mask")


def takes_prompts(model: nn.Module) -> bool:
    """Whether a model's forward takes `prompt_lengths`: it, or its backbone, has PEDRO adapters."""
    base = getattr(model, "get_base_model", None)
    return hasattr(model if base is None else base(), "_pedro_wiring")


class Active(NamedTuple):
    """The adapter that acts: its name, its config, and its generators, one a layer."""

    name: str
    config: PedroConfig
    generators: Sequence[nn.Module] | nn.ModuleList


class Wiring:
    """Hooks on a backbone and its decoder layers.

    Args:
        model: the backbone.
        active: says which adapter acts; None for none.
        always: whether it acts in every call of the backbone, which then takes `prompt_lengths` and
            `prompt_mask`; otherwise only in those within `reading`.

    Raises:
        PedroError: the architecture is not known.
    """

    def __init__(
        self, model: PreTrainedModel, active: Callable[[], Active | None], always: bool = False
    ) -> None:
        self.shape = BackboneShape.from_hf_config(model.config)
        self.prompts: Prompts | None = None
        self.wants_hidden_states = False
        self._running: Pass | None = None
        self._model = model
        self._active = active
        self._always = always
        projections = find_projections(model, self.shape)
        model._pedro_wiring = self
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]
        self._layers = [
            LayerHooks(index, layer, projections[index], self._running_pass)
            for index, layer in enumerate(decoder_layers(model))
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        del self._model._pedro_wiring
        for handle in self._handles:
            handle.remove()
        for hooks in self._layers:
            for handle in hooks.handles:
                handle.remove()

    @contextmanager
    def reading(self, prompts: Prompts | None) -> Iterator[None]:
        """Let the adapter act, with `prompts` for the sequences that are new."""
        before, self.prompts = self.prompts, prompts
        try:
            yield
        finally:
            self.prompts = before

    def prompts_to_read(self, kwargs: dict[str, Any]) -> Prompts | None:
        """What a forward pass is told of its prompts; None where no adapter acts.

        Args:
            kwargs: its keyword arguments. `prompt_lengths` and `prompt_mask` are taken out, and the
                KV cache is switched off if sequences are packed.

        Raises:
            PedroError: prompts that do not fit, or, in training, none that are told.
        """
        told = {key: kwargs.pop(key, None) for key in PROMPT_KEYS}
        active = self._active()
        if active is None:
            return None
        learns = torch.is_grad_enabled() and self._model.training
        if learns and not any(p.requires_grad for g in active.generators for p in g.parameters()):
            learns = False
            if kwargs.get("labels") is not None and not active.config.inference_mode:
                raise PedroError(
                    f"adapter {active.name!r} is frozen, so nothing would be learnt: "
                    "prepare_model_for_kbit_training, and whatever else freezes a model, has to "
                    "come before the adapter; set_adapter makes it trainable again"
                )
        return _prompts_to_read(told, kwargs, learns)

    @contextmanager
    def generating(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Around transformers' `generate`; takes out of `kwargs` what that does not know.

        Raises:
            PedroError: prompts that do not fit.
        """
        given = [kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
        tokens = next((tensor for tensor in given if tensor is not None), None)
        prompts = _prompts_of(
            kwargs.pop("prompt_lengths", None),
            kwargs.pop("prompt_mask", None),
            None if tokens is None else tokens.shape[1],
            kwargs.get("attention_mask"),
            kwargs.get("past_key_values"),
            expands=True,
        )
        # Compiled, the hooks would not run.
        kwargs.setdefault("disable_compile", True)
        with self.reading(prompts):
            yield

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.wants_hidden_states:
            kwargs = kwargs | {"output_hidden_states": True, "logits_to_keep": 1}
        prompts = self.prompts
        if self._always:
            kwargs = dict(kwargs)
            if args and "input_ids" not in kwargs:
                args, kwargs["input_ids"] = args[1:], args[0]
            if prompts is None:
                prompts = self.prompts_to_read(kwargs)
            for key in PROMPT_KEYS:
                kwargs.pop(key, None)
        active = None if prompts is None else self._active()
        self._running = None
        if prompts is None or active is None:
            return args, kwargs
        cache = kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            self._running = self._continued(active, cache)
            return args, kwargs | {PASS_KEY: self._running}
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        mask = packed = readers = None
        if prompts.sequences is not None:
            packed = prompts.packed(tokens, active.config.pooling)
            readers = packed.sequences
        else:
            mask = prompts.pooled_tokens(tokens, kwargs.get("attention_mask"))
        if active.config.scope == "answer":
            readers = readers_from_pooled_token(tokens, mask, packed)
        vectors = PromptVectors(active.name)
        self._running = Pass(active.generators, vectors, mask, True, packed, readers)
        return args, kwargs | {PASS_KEY: self._running}

    def _running_pass(self) -> Pass | None:
        return self._running

    def _continued(self, active: Active, cache: Any) -> Pass:
        vectors = getattr(cache, "pedro_vectors", None)
        if vectors is None or len(vectors.layers) != self.shape.num_layers:
            raise PedroError(
                "the KV cache was filled without an adapter: its sequences have no vectors; start "
                "from an empty cache"
            )
        if vectors.adapter != active.name:
            raise PedroError(
                f"the KV cache was filled with adapter {vectors.adapter!r}, but {active.name!r} is "
                "active"
            )
        return Pass(active.generators, vectors, None, False)

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        current: Pass | None = kwargs.get(PASS_KEY)
        self._running = None
        if current is not None:
            missed = set(range(self.shape.num_layers)) - current.layers_run
            if missed:
                raise PedroError(
                    f"{type(module).__name__}: layers {shorten(sorted(missed))} never saw the "
                    "adapter"
                )
            checkpoints = getattr(module, "is_gradient_checkpointing", False) and module.training
            if not current.is_handed_on and checkpoints and torch.is_grad_enabled():
                raise PedroError(
                    f"{type(module).__name__}: no gradient checkpointing: the model does not pass "
                    "keyword arguments on to its decoder layers, which would run again without "
                    "the adapter"
                )
        if not self.wants_hidden_states:
            return None
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=output.hidden_states[-1])


def _prompts_to_read(told: dict[str, Any], kwargs: dict[str, Any], learns: bool) -> Prompts:
    cache, sequences = kwargs.get("past_key_values"), None
    lengths, mask = told["prompt_lengths"], told["prompt_mask"]
    attention_mask, labels = kwargs.get("attention_mask"), kwargs.get("labels")
    if attention_mask is None and cache is None:
        sequences = packed_sequences(kwargs.get("position_ids"))
    if sequences is not None:
        if kwargs.get("use_cache"):
            raise PedroError("packed sequences (position_ids that start again): no KV cache")
        # A cache would keep transformers from seeing that they are packed.
        kwargs["use_cache"] = False
    filled = cache is not None and int(cache.get_seq_length()) > 0
    if filled or lengths is not None or mask is not None:
        pass
    elif labels is None and learns:
        raise PedroError(
            "in training a model has to be told what the prompt is, or it would pool what it is to "
            "answer: give labels, prompt_lengths or prompt_mask (for label_smoothing_factor and "
            "compute_loss_func transformers' Trainer takes labels away)"
        )
    elif labels is not None:
        real = None
        if isinstance(attention_mask, Tensor) and attention_mask.shape == labels.shape:
            real = attention_mask.bool()
        mask = tokens_before_labels(labels, real, sequences)
    return _prompts_of(lengths, mask, None, None, cache, sequences=sequences)


def _prompts_of(
    lengths: Tensor | Sequence[int] | None,
    mask: Tensor | None,
    width: int | None,
    attention_mask: Tensor | None,
    cache: Any,
    expands: bool = False,
    sequences: Tensor | None = None,
) -> Prompts:
    if lengths is not None and mask is not None:
        raise PedroError("prompt_lengths and prompt_mask: give one of them")
    filled = cache is not None and int(cache.get_seq_length()) > 0
    if filled and (lengths is not None or mask is not None):
        raise PedroError(
            "prompt_lengths and prompt_mask say what to pool when a prompt is read; with a "
            "filled KV cache it has been read already"
        )
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
        if lengths.dim() != 1 or lengths.is_floating_point() or lengths.dtype == torch.bool:
            raise PedroError(
                f"prompt_lengths: expected ints [B], found {lengths.dtype} {list(lengths.shape)}"
            )
    if mask is not None:
        if mask.dim() != 2:
            raise PedroError(f"prompt_mask: expected [B, S], found {list(mask.shape)}")
        mask = mask.bool()
    if attention_mask is not None:
        # With a filled cache it is longer than the prompt, and not used.
        attention_mask = None if filled else attention_mask.bool()
    return Prompts(width, attention_mask, lengths, mask, expands, sequences)
