"""`PedroModel`: a transformers model with an adapter, in the idiom of PEFT."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter import load_adapter, save_adapter, tensor_name
from ..backbone import BackboneShape
from ..config import PedroConfig
from ..errors import PedroError
from ..files import shorten
from ..generator import VectorGenerator
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


class _Switch:
    """Turns adapters on or off at once; as a context manager, until the block ends."""

    def __init__(self, model: PedroModel, enabled: bool) -> None:
        self._model = model
        self._before = model.adapter_enabled
        model.adapter_enabled = enabled

    def __enter__(self) -> PedroModel:
        return self._model

    def __exit__(self, *exception: object) -> None:
        self._model.adapter_enabled = self._before


def _leave_out_backbone(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}base_model.")]:
        del state_dict[name]


def _do_not_miss_backbone(module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if "base_model" not in name.split(".")]


class PedroModel(nn.Module):
    """A frozen transformers causal language model with PEDRO adapters.

    The backbone keeps its modules and parameter names; called directly, it behaves as if there
    were no adapters. Attributes that are not found here are the backbone's (`config`, `device`,
    `gradient_checkpointing_enable`, ...). The state dict holds the adapters and not the frozen
    backbone, so that checkpoints of a `Trainer` are as small as an adapter.

    Args:
        model: the backbone: Llama, Mistral, Qwen2, Qwen3, Gemma 1-3, Phi-3 and others whose
            decoder layers have the same modules.
        config: the first adapter's config; the adapter starts as the identity.
        adapter_name: its name.

    Raises:
        PedroError: the architecture is not known, or the config does not fit the backbone.
    """

    def __init__(
        self, model: PreTrainedModel, config: PedroConfig, adapter_name: str = "default"
    ) -> None:
        super().__init__()
        self.shape = BackboneShape.from_hf_config(model.config)
        projections = find_projections(model, self.shape)
        self.base_model = model
        self.vector_generators = nn.ModuleDict()
        self.pedro_configs: dict[str, PedroConfig] = {}
        self.active_adapter: str | None = None
        self.adapter_enabled = True
        self._prompts: Prompts | None = None
        self._wants_hidden_states = False
        # Before anything is hooked or frozen: a refused config leaves the model as it was.
        self.add_adapter(adapter_name, config)
        model.requires_grad_(False)
        self.set_adapter(adapter_name)
        self._handles = [
            model.register_forward_pre_hook(self._before_backbone, with_kwargs=True),
            model.register_forward_hook(self._after_backbone, with_kwargs=True),
        ]
        self._layer_hooks = [
            LayerHooks(index, layer, projections)
            for index, layer in enumerate(decoder_layers(model))
        ]
        self.register_forward_pre_hook(self._before_fused, with_kwargs=True)
        self.register_forward_hook(self._after_fused, always_call=True)
        self.register_state_dict_post_hook(_leave_out_backbone)
        self.register_load_state_dict_post_hook(_do_not_miss_backbone)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `forward` takes `num_items_in_batch`; `Trainer` asks."""
        return bool(getattr(self.base_model, "accepts_loss_kwargs", True))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(super().__getattr__("base_model"), name)

    # ---- adapters

    @classmethod
    def from_pretrained(
        cls,
        base_model: PreTrainedModel,
        path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> PedroModel:
        """Put the adapter saved in folder `path` on a backbone.

        Args:
            base_model: the backbone.
            path: the adapter folder.
            adapter_name: name to give it.
            is_trainable: whether its parameters require gradients, as in PEFT.

        Raises:
            AdapterError: the folder holds no valid adapter for this backbone.
            PedroError: the architecture is not known.
        """
        adapter = load_adapter(path, BackboneShape.from_hf_config(base_model.config))
        model = cls(base_model, adapter.config, adapter_name)
        model._fill(adapter_name, adapter.tensors, is_trainable)
        return model

    def load_adapter(
        self, path: str | os.PathLike[str], adapter_name: str, is_trainable: bool = False
    ) -> None:
        """Add the adapter saved in folder `path`; it does not become the active one.

        Raises:
            AdapterError: the folder holds no valid adapter for this backbone.
            PedroError: the name is taken or not usable.
        """
        adapter = load_adapter(path, self.shape)
        self.add_adapter(adapter_name, adapter.config)
        self._fill(adapter_name, adapter.tensors, is_trainable)

    def save_pretrained(
        self,
        path: str | os.PathLike[str],
        adapter_name: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Write an adapter folder, with `inference_mode` true, as PEFT does.

        Args:
            path: the folder.
            adapter_name: the adapter; None for the active one.
            dtype: the dtype to store; None for float32.

        Returns:
            The adapter's digest.

        Raises:
            AdapterError: the parameters are not finite.
        """
        name = self._known(adapter_name if adapter_name is not None else self._active())
        values = self.pedro_configs[name].to_dict() | {"inference_mode": True}
        if values["base_model_name_or_path"] is None:
            values["base_model_name_or_path"] = self.base_model.config.name_or_path or None
        return save_adapter(path, PedroConfig.from_dict(values), self.adapter_tensors(name), dtype)

    def adapter_tensors(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """An adapter's parameters by their on-disk names, detached, sharing memory."""
        name = self._known(adapter_name if adapter_name is not None else self._active())
        return {
            tensor_name(index, suffix): tensor
            for index, generator in enumerate(self._generators(name))
            for suffix, tensor in generator.state_dict().items()
        }

    def add_adapter(self, adapter_name: str, config: PedroConfig) -> None:
        """Add a fresh adapter; it does not become the active one.

        Raises:
            PedroError: the name is taken or not usable, or the config does not fit the backbone.
        """
        if adapter_name in self.pedro_configs:
            raise PedroError(f"adapter {adapter_name!r} exists already")
        config.validate(self.shape.num_layers)
        generators = nn.ModuleList()
        for index, layer in enumerate(decoder_layers(self.base_model)):
            device = next(layer.parameters()).device
            generators.append(VectorGenerator(config, self.shape, index).to(device))
        try:
            self.vector_generators[adapter_name] = generators
        except (KeyError, TypeError) as error:
            raise PedroError(f"adapter name {adapter_name!r}: not usable, {error}") from None
        self.pedro_configs[adapter_name] = config
        generators.requires_grad_(False)

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the active one, and, if its config says so, the trainable one."""
        self.active_adapter = self._known(adapter_name)
        for name, config in self.pedro_configs.items():
            trainable = name == adapter_name and not config.inference_mode
            self._generators(name).requires_grad_(trainable)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; after removing the active one, none is active."""
        del self.vector_generators[self._known(adapter_name)]
        del self.pedro_configs[adapter_name]
        if self.active_adapter == adapter_name:
            self.active_adapter = None

    def enable_adapter(self) -> _Switch:
        """Use the active adapter again; also a context manager, for a block."""
        return _Switch(self, True)

    def disable_adapter(self) -> _Switch:
        """Behave as the bare backbone; also a context manager, for a block."""
        return _Switch(self, False)

    def get_base_model(self) -> PreTrainedModel:
        """The backbone, which applies no adapter when called directly."""
        return self.base_model

    def unload(self) -> PreTrainedModel:
        """Take the hooks off the backbone and return it; it stays frozen."""
        for handle in self._handles:
            handle.remove()
        for hooks in self._layer_hooks:
            for handle in hooks.handles:
                handle.remove()
        return self.base_model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of trainable parameters, and of all."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of `get_nb_trainable_parameters`."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def _generators(self, name: str) -> nn.ModuleList:
        generators = self.vector_generators[name]
        assert isinstance(generators, nn.ModuleList)
        return generators

    def _known(self, name: str) -> str:
        if name not in self.pedro_configs:
            raise PedroError(
                f"no adapter {name!r}; there are {shorten(sorted(self.pedro_configs)) or 'none'}"
            )
        return name

    def _active(self) -> str:
        if self.active_adapter is None:
            raise PedroError("no adapter is active; call set_adapter(name) or disable_adapter()")
        return self.active_adapter

    def _fill(self, name: str, tensors: dict[str, Tensor], is_trainable: bool) -> None:
        with torch.no_grad():
            for key, parameter in self.adapter_tensors(name).items():
                parameter.copy_(tensors[key])
        values = self.pedro_configs[name].to_dict() | {"inference_mode": not is_trainable}
        self.pedro_configs[name] = PedroConfig.from_dict(values)
        if self.active_adapter == name:
            self.set_adapter(name)

    # ---- running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_lengths: Tensor | Sequence[int] | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The backbone's forward with the active adapter.

        With an empty KV cache, or none, the rows are read as new sequences and their vectors are
        made from their prompts. With a filled one, the vectors made when it was filled are used.

        Packed sequences are recognised as transformers recognises them, by `position_ids` that
        start again within a row, without an attention mask and a KV cache. Each is pooled over
        its own prompt and scaled by its own vectors.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`, 1 at real tokens; padding may be on either side.
            labels: `[B, S]`, as the backbone takes them.
            prompt_lengths: how many of a sequence's first real tokens are pooled: `[B]`, or `[N]`
                for N packed sequences, in order. By default all tokens, or, with labels, those
                before the first that is not -100: the completion is what has labels, and serving
                never sees it when it pools.
            prompt_mask: bool `[B, S]`, the pooled tokens, instead of `prompt_lengths`.
            **kwargs: whatever else the backbone takes.

        Returns:
            The backbone's output.

        Raises:
            PedroError: prompt lengths that do not fit, a prompt given with a filled KV cache, a
                KV cache that was not filled with this adapter, or one asked for with packed
                sequences.
        """
        prompts = self._prompts_to_read(attention_mask, labels, prompt_lengths, prompt_mask, kwargs)
        with self._reading(prompts):
            return self.base_model(
                input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs
            )

    def generate(
        self,
        inputs: Tensor | None = None,
        prompt_lengths: Tensor | Sequence[int] | None = None,
        prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` with the active adapter: greedy, sampling, beams.

        Args:
            inputs: `[B, S]` token ids; `input_ids` works too.
            prompt_lengths: `[B]`, how many of the row's first real tokens are pooled; by default
                all of them.
            prompt_mask: bool `[B, S]`, the pooled tokens, instead of `prompt_lengths`.
            **kwargs: whatever else `generate` takes.

        Raises:
            PedroError: as `forward` does, and where a prompt would be read in chunks.
        """
        tokens = inputs
        for name in ("input_ids", "inputs_embeds"):
            tokens = kwargs.get(name) if tokens is None else tokens
        width = None if tokens is None else tokens.shape[1]
        prompts = self._prompts_of(
            prompt_lengths,
            prompt_mask,
            width,
            kwargs.get("attention_mask"),
            kwargs.get("past_key_values"),
            expands=True,
        )
        if inputs is not None:
            kwargs["inputs"] = inputs
        # Compiled, the hooks would not run.
        kwargs.setdefault("disable_compile", True)
        with self._reading(prompts):
            return self.base_model.generate(**kwargs)

    def _prompts_to_read(
        self,
        attention_mask: Any,
        labels: Tensor | None,
        prompt_lengths: Tensor | Sequence[int] | None,
        prompt_mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Prompts:
        """What `forward` is told of its prompts; switches the cache off in `kwargs` if packed."""
        cache, sequences = kwargs.get("past_key_values"), None
        if attention_mask is None and cache is None:
            sequences = packed_sequences(kwargs.get("position_ids"))
        if sequences is not None:
            if kwargs.get("use_cache"):
                raise PedroError("packed sequences (position_ids that start again): no KV cache")
            # A cache would keep transformers from seeing that they are packed.
            kwargs["use_cache"] = False
        filled = cache is not None and int(cache.get_seq_length()) > 0
        if labels is not None and prompt_lengths is None and prompt_mask is None and not filled:
            real = None
            if isinstance(attention_mask, Tensor) and attention_mask.shape == labels.shape:
                real = attention_mask.bool()
            prompt_mask = tokens_before_labels(labels, real, sequences)
        return self._prompts_of(prompt_lengths, prompt_mask, None, None, cache, sequences=sequences)

    # TRL replaces `forward` by one that takes the final hidden states from `self.base_model` and
    # computes the loss itself, and asks for it with `fused_lm_head`. Hooks of `__call__` run
    # around whatever `forward` is, so the adapter takes part in that too.

    def _before_fused(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not kwargs.get("fused_lm_head"):
            return None
        kwargs = dict(kwargs)
        prompts = self._prompts_to_read(
            kwargs.get("attention_mask"),
            kwargs.get("labels"),
            kwargs.pop("prompt_lengths", None),
            kwargs.pop("prompt_mask", None),
            kwargs,
        )
        self._prompts = prompts if self.adapter_enabled else None
        self._wants_hidden_states = True
        return args, kwargs

    def _after_fused(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._wants_hidden_states:
            self._prompts, self._wants_hidden_states = None, False

    def _prompts_of(
        self,
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
                    f"prompt_lengths: expected ints [B], found {lengths.dtype} "
                    f"{list(lengths.shape)}"
                )
        if mask is not None:
            if mask.dim() != 2:
                raise PedroError(f"prompt_mask: expected [B, S], found {list(mask.shape)}")
            mask = mask.bool()
        if attention_mask is not None:
            # With a filled cache it is longer than the prompt, and not used.
            attention_mask = None if filled else attention_mask.bool()
        return Prompts(width, attention_mask, lengths, mask, expands, sequences)

    @contextmanager
    def _reading(self, prompts: Prompts) -> Iterator[None]:
        """Let the hooks act, with `prompts` for the sequences that are new."""
        before, self._prompts = self._prompts, prompts if self.adapter_enabled else None
        try:
            yield
        finally:
            self._prompts = before

    def _before_backbone(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._wants_hidden_states:
            kwargs = kwargs | {"output_hidden_states": True, "logits_to_keep": 1}
        if self._prompts is None:
            return args, kwargs
        name = self._active()
        cache = kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            current = self._continued(name, cache)
        else:
            tokens = kwargs.get("input_ids")
            if tokens is None:
                tokens = kwargs["inputs_embeds"]
            mask = packed = readers = None
            config = self.pedro_configs[name]
            if self._prompts.sequences is not None:
                packed = self._prompts.packed(tokens, config.pooling)
                readers = packed.sequences
            else:
                mask = self._prompts.pooled_tokens(tokens, kwargs.get("attention_mask"))
            if config.scope == "answer":
                readers = readers_from_pooled_token(tokens, mask, packed)
            vectors = PromptVectors(name)
            current = Pass(self._generators(name), vectors, mask, True, packed, readers)
        return args, kwargs | {PASS_KEY: current}

    def _continued(self, name: str, cache: Any) -> Pass:
        vectors = getattr(cache, "pedro_vectors", None)
        if vectors is None or len(vectors.layers) != self.shape.num_layers:
            raise PedroError(
                "the KV cache was filled without an adapter: its sequences have no vectors; start "
                "from an empty cache"
            )
        if vectors.adapter != name:
            raise PedroError(
                f"the KV cache was filled with adapter {vectors.adapter!r}, but {name!r} is active"
            )
        return Pass(self._generators(name), vectors, None, False)

    def _after_backbone(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        self._check_layers(module, kwargs.get(PASS_KEY))
        if not self._wants_hidden_states:
            return None
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=output.hidden_states[-1])

    def _check_layers(self, module: nn.Module, current: Pass | None) -> None:
        if current is None:
            return
        missed = set(range(self.shape.num_layers)) - current.layers_run
        if missed:
            raise PedroError(
                f"{type(module).__name__}: layers {shorten(sorted(missed))} never saw the "
                "adapter: the model does not pass keyword arguments on to its decoder layers"
            )


def get_pedro_model(
    model: PreTrainedModel, config: PedroConfig, adapter_name: str = "default"
) -> PedroModel:
    """Put a fresh, trainable adapter on a backbone, and freeze the backbone.

    A fresh adapter changes nothing: the outputs are bit-equal to the backbone's.

    Raises:
        PedroError: the architecture is not known, or the config does not fit the backbone.
    """
    return PedroModel(model, config, adapter_name)
