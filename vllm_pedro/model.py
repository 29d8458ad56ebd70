"""PEDRO on a plain transformers model: for training, and the reference that serving is held to.

`PedroModel` leaves the backbone's modules and their names alone and works by hooks. One forward
pass goes like this:

1. Before the backbone's forward, a `_Pass` is made: either with the mask of the prompt tokens (a
   prompt is being read), or with the vectors that the KV cache carries (a sequence goes on).
2. The pass travels to each decoder layer as a keyword argument. A keyword argument, and not an
   attribute somewhere, because gradient checkpointing runs a layer again in the backward pass,
   long after the forward pass has ended, and hands it the arguments of its first run.
3. Before a layer's forward, its vectors are made from its input, or taken from the pass; hooks on
   its projections multiply their outputs; after it, everything it should have done is checked.
4. The vectors ride on the KV cache, so whatever reorders, repeats or copies the cache does the
   same to them.

A sequence is a row of the input, or, in packed training, a stretch of one: the vectors then have a
row for each sequence, and each token is told which one is its own.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from vllm_pedro.adapter import load_adapter, save_adapter, tensor_name
from vllm_pedro.config import BackboneShape, PedroConfig, shorten
from vllm_pedro.errors import PedroError
from vllm_pedro.generator import VectorGenerator
from vllm_pedro.scaling import scale_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PASS_KEY = "pedro_pass"
IGNORED_LABEL: Final = -100  # what transformers' losses leave out

# Which modules of a decoder layer compute the projections, and in which order a fused one stacks
# them. The order cannot be read off a model, so fused ones are trusted only where it is known.
_SEPARATE = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
}
_FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
_FUSED_MODEL_TYPES = ("phi3",)


@dataclass
class PromptVectors:
    """The vectors of a batch of sequences, made when their prompts were read.

    Attributes:
        adapter: name of the adapter that made them.
        layers: by layer index and target module, `[B, d_t]`.
    """

    adapter: str
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def select(self, rows: Tensor) -> PromptVectors:
        """The vectors of these rows, `[B']`, in this order."""
        return self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat_interleave(self, repeats: int) -> PromptVectors:
        """Every row `repeats` times in succession."""
        return self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _map(self, function: Any) -> PromptVectors:
        layers = {
            index: {name: function(tensor) for name, tensor in vectors.items()}
            for index, vectors in self.layers.items()
        }
        return PromptVectors(self.adapter, layers)


class _CarriesVectors:
    """Mixed into the class of a KV cache: its rows and the vectors' rows stay the same ones."""

    pedro_vectors: PromptVectors

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]  # a mixin: Cache has it
        self.pedro_vectors = self.pedro_vectors.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]  # a mixin: Cache has it
        self.pedro_vectors = self.pedro_vectors.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]  # a mixin: Cache has it
        self.pedro_vectors = self.pedro_vectors.repeat_interleave(repeats)


@functools.cache
def _carrier_class(cache_class: Any) -> type:
    return type(f"Pedro{cache_class.__name__}", (_CarriesVectors, cache_class), {})


def _attach(cache: Any, vectors: PromptVectors) -> None:
    """Let `cache` carry `vectors`.

    Its class is changed in place, because the object is often the caller's, and because methods
    replaced on the object would still be bound to it in a deep copy.
    """
    if not isinstance(cache, _CarriesVectors):
        cache.__class__ = _carrier_class(cast(Hashable, type(cache)))
    cache.pedro_vectors = vectors


@dataclass(frozen=True)
class _Prompts:
    """What a call says about its prompts.

    Attributes:
        width: columns of the input that can hold prompt tokens; later ones are generated. None if
            the whole input can.
        attention_mask: bool `[B, width]`; None if unknown until the backbone is called.
        lengths: `[B]`, pooled length of each row in real tokens; None for all of them.
        mask: bool `[B, width]`, the pooled tokens, instead of lengths.
        expands: whether the backbone may be called with a multiple of B rows (beams, samples).
        sequences: `[B, width]`, which of N packed sequences each token belongs to; `lengths` is
            then `[N]`. None if every row is one sequence.
    """

    width: int | None = None
    attention_mask: Tensor | None = None
    lengths: Tensor | None = None
    mask: Tensor | None = None
    expands: bool = False
    sequences: Tensor | None = None

    def packed(self, tokens: Tensor, pooling: str) -> _Packed:
        """Where the pooled tokens of packed sequences are.

        Args:
            tokens: the backbone's input, `[B, S, ...]`.
            pooling: the adapter's; for "last" one token of each sequence is enough.
        """
        assert self.sequences is not None
        sequences = self.sequences.to(tokens.device)
        if sequences.shape != tokens.shape[:2]:
            raise PedroError(
                f"position_ids: expected {list(tokens.shape[:2])}, found {list(sequences.shape)}"
            )
        of_token = sequences.flatten()
        number = int(of_token[-1]) + 1
        sizes = of_token.bincount(minlength=number)
        pooled = torch.ones_like(of_token, dtype=torch.bool)
        place = torch.arange(len(of_token), device=tokens.device)
        place = place - (sizes.cumsum(0) - sizes)[of_token]
        if self.lengths is not None:
            lengths = self.lengths.to(tokens.device)
            if len(lengths) != number:
                raise PedroError(
                    f"prompt_lengths: expected one for each of the {number} packed sequences, "
                    f"found {len(lengths)}"
                )
            _check_lengths(lengths, sizes)
            pooled = place < lengths[of_token]
        if self.mask is not None:
            if self.mask.shape != tokens.shape[:2]:
                raise PedroError(
                    f"prompt_mask: expected {list(tokens.shape[:2])}, found {list(self.mask.shape)}"
                )
            pooled = pooled & self.mask.to(tokens.device).flatten()
        counts = of_token[pooled].bincount(minlength=number)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise PedroError(f"packed sequences {shorten(empty)} have no prompt token to pool")
        chosen = pooled.nonzero().flatten()
        ends = counts.cumsum(0)
        if pooling == "last":
            return _Packed(chosen[ends - 1][:, None], None, sequences)
        columns = torch.arange(int(counts.max()), device=tokens.device)
        mask = columns < counts[:, None]
        index = chosen[((ends - counts)[:, None] + columns).clamp(max=len(chosen) - 1)]
        return _Packed(index, mask, sequences)

    def pooled_tokens(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """Mask of the pooled tokens, bool `[B, S]`; None means every token.

        Args:
            tokens: the backbone's input, `[B, S, ...]`.
            attention_mask: the one the backbone is called with, in whatever form.
        """
        rows, width = tokens.shape[:2]
        prompt_width = width if self.width is None else self.width
        if width < prompt_width:
            raise PedroError(
                f"the prompt has {prompt_width} columns, but the backbone was called with the "
                f"first {width}: PEDRO reads a prompt in one forward pass; switch chunked prefill "
                "off, and gradient checkpointing while generating"
            )
        if self.attention_mask is not None:
            attention_mask = self._expand(self.attention_mask, rows)
        elif attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
                raise PedroError(
                    "attention_mask: expected [B, S] with 1 at real tokens, found another form; "
                    "padding cannot be told from it"
                )
            if attention_mask.shape != (rows, width):
                raise PedroError(
                    f"attention_mask: expected {[rows, width]} without a filled KV cache, "
                    f"found {list(attention_mask.shape)}"
                )
            attention_mask = attention_mask[:, :prompt_width].bool()
        if attention_mask is None:
            if self.lengths is None and self.mask is None and width == prompt_width:
                return None
            attention_mask = torch.ones(rows, prompt_width, dtype=torch.bool, device=tokens.device)

        pooled = attention_mask
        if self.lengths is not None:
            lengths = self._expand(self.lengths, rows).to(pooled.device)
            _check_lengths(lengths, pooled.sum(dim=1))
            pooled = pooled & (pooled.cumsum(dim=1) <= lengths[:, None])
        if self.mask is not None:
            mask = self._expand(self.mask, rows).to(pooled.device)
            if mask.shape != pooled.shape:
                raise PedroError(
                    f"prompt_mask: expected {list(pooled.shape)}, found {list(mask.shape)}"
                )
            pooled = pooled & mask
        empty = (~pooled.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise PedroError(f"rows {shorten(empty)} have no prompt token to pool")
        return _pad_columns(pooled, width)

    def _expand(self, tensor: Tensor, rows: int) -> Tensor:
        if tensor.shape[0] == rows:
            return tensor
        if not self.expands or rows % tensor.shape[0]:
            raise PedroError(
                f"expected one prompt length, or row of a mask, for each of the {rows} rows of "
                f"the input, found {tensor.shape[0]}"
            )
        return tensor.repeat_interleave(rows // tensor.shape[0], dim=0)


def _pad_columns(mask: Tensor, width: int) -> Tensor:
    return nn.functional.pad(mask, (0, width - mask.shape[1]), value=False)


def _check_lengths(lengths: Tensor, available: Tensor) -> None:
    if bool(((lengths < 1) | (lengths > available)).any()):
        raise PedroError(
            "prompt_lengths: expected between 1 and the number of tokens in each row, "
            f"{available.tolist()}, found {lengths.tolist()}"
        )


def _packed_sequences(position_ids: Tensor | None) -> Tensor | None:
    """Which packed sequence each token belongs to, `[B, S]`, numbered over all rows.

    The rule is that of transformers, which makes the attention mask from it: without an
    attention mask and a KV cache, a new sequence begins where positions do not go on by one.

    Returns:
        None where every row is one sequence.
    """
    if position_ids is None or position_ids.dim() != 2:
        return None
    begins = torch.diff(position_ids, dim=-1) != 1
    if not bool(begins.any()):
        return None
    begins = nn.functional.pad(begins, (1, 0), value=True)
    return begins.flatten().cumsum(0).view_as(position_ids) - 1


def _tokens_before_labels(labels: Tensor, real: Tensor | None, sequences: Tensor | None) -> Tensor:
    """The tokens before the first label of each sequence, bool `[B, S]`.

    A sequence whose very first token has a label has no prompt by that rule. No model predicts
    that token, so taking it for the prompt gives nothing away; anything more would.

    Args:
        labels: `[B, S]`, -100 where there is none.
        real: `[B, S]`, False at padding; None for no padding.
        sequences: as `_packed_sequences` gives them; None where every row is one.
    """
    rows, width = labels.shape
    if sequences is None:
        sequences = torch.arange(rows, device=labels.device)[:, None].expand(rows, width)
    sequences = sequences.to(labels.device)
    real = torch.ones_like(labels, dtype=torch.bool) if real is None else real.to(labels.device)
    places = torch.arange(rows * width, device=labels.device).view(rows, width)

    def first(chosen: Tensor) -> Tensor:
        found = torch.full((int(sequences.max()) + 1,), rows * width, device=labels.device)
        candidates = torch.where(chosen, places, rows * width).flatten()
        return found.scatter_reduce(0, sequences.flatten(), candidates, "amin")[sequences]

    first_label, first_token = first((labels != IGNORED_LABEL) & real), first(real)
    if bool((first_label <= first_token).logical_and(real).any()):
        warnings.warn(
            "labels begin at the first token of a sequence, so it has no prompt: its first token "
            "alone is pooled. Give labels to the completion only (-100 elsewhere), or "
            "prompt_lengths",
            stacklevel=4,
        )
    return (places < torch.maximum(first_label, first_token + 1)) & real


@dataclass(frozen=True)
class _Packed:
    """Where packed sequences are in the input.

    Attributes:
        index: `[N, P]`, their pooled tokens, counted over the flattened input.
        mask: bool `[N, P]`, False where a sequence pools fewer than P; None if none does.
        sequences: `[B, S]`, the sequence of each token.
    """

    index: Tensor
    mask: Tensor | None
    sequences: Tensor


@dataclass
class _Pass:
    """One forward pass of the backbone.

    Attributes:
        generators: the adapter's vector generators, one a layer.
        vectors: those made in this pass, or, if `is_prefill` is False, those to reuse.
        mask: bool `[B, S]`, the pooled tokens; None means all.
        is_prefill: whether prompts are being read.
        packed: where the sequences are, if rows hold several; `mask` is then not used.
        layers_run: indices of the layers that took part.
    """

    generators: nn.ModuleList
    vectors: PromptVectors
    mask: Tensor | None
    is_prefill: bool
    packed: _Packed | None = None
    layers_run: set[int] = field(default_factory=set)

    def vectors_of(self, index: int, hidden: Tensor, cache: Any) -> dict[str, Tensor]:
        """The vectors of layer `index`, `[B, d_t]` each, or `[N, d_t]` of N packed sequences."""
        self.layers_run.add(index)
        if not self.is_prefill:
            vectors = self.vectors.layers[index]
            rows = next(iter(vectors.values())).shape[0]
            if rows != hidden.shape[0]:
                raise PedroError(
                    f"the KV cache carries vectors of {rows} sequences, the input has "
                    f"{hidden.shape[0]}"
                )
            return vectors
        generator = cast(VectorGenerator, self.generators[index])
        device = generator.up_proj.bias.device
        mask = self.mask
        if self.packed is not None:
            hidden = hidden.flatten(0, 1)[self.packed.index.to(hidden.device)]
            mask = self.packed.mask
        mask = None if mask is None else mask.to(device)
        vectors = cast(dict[str, Tensor], generator(hidden.to(device), mask))
        if cache is not None:
            self.vectors.layers[index] = vectors
            _attach(cache, self.vectors)
        return vectors


class _LayerHooks:
    """What PEDRO does in one decoder layer."""

    def __init__(self, index: int, layer: nn.Module, projections: _Projections) -> None:
        self.index = index
        self.widths = projections.widths
        self.current: dict[str, Tensor] | None = None
        self.sequences: Tensor | None = None
        self.applied: list[str] = []
        self.handles = [
            layer.register_forward_pre_hook(self.before, with_kwargs=True),
            layer.register_forward_hook(self.after, always_call=True),
        ]
        for path, names in projections.modules.items():
            hook = functools.partial(self.scale, names=names)
            self.handles.append(layer.get_submodule(path).register_forward_hook(hook))

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        current: _Pass | None = kwargs.pop(_PASS_KEY, None)
        if current is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        self.applied = []
        self.sequences = None if current.packed is None else current.packed.sequences
        self.current = current.vectors_of(self.index, hidden, kwargs.get("past_key_values"))
        return args, kwargs

    def scale(
        self, module: nn.Module, args: Any, output: Tensor, names: tuple[str, ...]
    ) -> Tensor | None:
        if self.current is None or not any(name in self.current for name in names):
            return None
        parts = []
        rows = next(iter(self.current.values())).shape[0]
        for name in names:
            vector = self.current.get(name)
            if vector is None:
                vector = output.new_ones(rows, self.widths[name])
            else:
                self.applied.append(name)
            parts.append(vector.to(output.device, output.dtype))
        factor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        sequences = None if self.sequences is None else self.sequences.to(output.device)
        return scale_sequences(output, factor, sequences)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self.current = self.current, None
        # None: the layer raised, as it does when checkpointing stops a second run early.
        if current is not None and output is not None and sorted(self.applied) != sorted(current):
            raise PedroError(
                f"layer {self.index}: expected one use of each of {list(current)}, found "
                f"{self.applied}: this layer does not compute its projections as PEDRO expects"
            )


@dataclass(frozen=True)
class _Projections:
    """Where a model computes the five projections.

    Attributes:
        modules: paths of modules in a decoder layer, with the projections each computes.
        widths: output width of each projection.
    """

    modules: dict[str, tuple[str, ...]]
    widths: dict[str, int]


def _decoder_layers(model: nn.Module) -> nn.ModuleList:
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise PedroError(
            f"{type(model).__name__}: looked for the decoder layers in 'model.layers' and found "
            "none; PEDRO needs a decoder-only causal language model of the Llama kind (Llama, "
            "Mistral, Qwen2, Qwen3, Gemma, Phi-3)"
        )
    return layers


def _find_projections(model: PreTrainedModel, shape: BackboneShape) -> _Projections:
    """Find the five projections, and check that they are alike in every layer.

    Raises:
        PedroError: names the layer, what was looked for and what is there.
    """
    layers = _decoder_layers(model)
    if len(layers) != shape.num_layers:
        raise PedroError(
            f"{type(model).__name__}: expected {shape.num_layers} decoder layers by its config, "
            f"found {len(layers)}"
        )
    fused = _FUSED if model.config.model_type in _FUSED_MODEL_TYPES else {}
    modules: dict[str, tuple[str, ...]] = {}
    for path, stacked in _FUSED.items():
        if path in fused and _submodule(layers[0], path) is not None:
            modules[path] = stacked
        else:
            modules.update({_SEPARATE[name]: (name,) for name in stacked})
    for index, layer in enumerate(layers):
        for path, names in modules.items():
            module = _submodule(layer, path)
            if module is None:
                raise PedroError(
                    f"{type(model).__name__}: looked for '{path}' in decoder layer {index} and "
                    f"found no such module, only "
                    f"{sorted(name for name, _ in layer.named_children())} with "
                    f"{_grandchildren(layer)}: the projections of this architecture are not known"
                )
            want = sum(shape.widths[name] for name in names)
            found = getattr(module, "out_features", want)
            if found != want:
                raise PedroError(
                    f"{type(model).__name__}: decoder layer {index}, '{path}': expected "
                    f"{want} output features by the model's config, found {found}"
                )
    return _Projections(modules, dict(shape.widths))


def _submodule(layer: nn.Module, path: str) -> nn.Module | None:
    try:
        return layer.get_submodule(path)
    except AttributeError:
        return None


def _grandchildren(layer: nn.Module) -> list[str]:
    return sorted(name for name, _ in layer.named_modules() if name.count(".") == 1)


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
        projections = _find_projections(model, self.shape)
        self.base_model = model
        self.vector_generators = nn.ModuleDict()
        self.pedro_configs: dict[str, PedroConfig] = {}
        self.active_adapter: str | None = None
        self.adapter_enabled = True
        self._prompts: _Prompts | None = None
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
            _LayerHooks(index, layer, projections)
            for index, layer in enumerate(_decoder_layers(model))
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
        for index, layer in enumerate(_decoder_layers(self.base_model)):
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
    ) -> _Prompts:
        """What `forward` is told of its prompts; switches the cache off in `kwargs` if packed."""
        cache, sequences = kwargs.get("past_key_values"), None
        if attention_mask is None and cache is None:
            sequences = _packed_sequences(kwargs.get("position_ids"))
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
            prompt_mask = _tokens_before_labels(labels, real, sequences)
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
    ) -> _Prompts:
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
        return _Prompts(width, attention_mask, lengths, mask, expands, sequences)

    @contextmanager
    def _reading(self, prompts: _Prompts) -> Iterator[None]:
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
            mask = packed = None
            if self._prompts.sequences is not None:
                packed = self._prompts.packed(tokens, self.pedro_configs[name].pooling)
            else:
                mask = self._prompts.pooled_tokens(tokens, kwargs.get("attention_mask"))
            current = _Pass(self._generators(name), PromptVectors(name), mask, True, packed)
        return args, kwargs | {_PASS_KEY: current}

    def _continued(self, name: str, cache: Any) -> _Pass:
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
        return _Pass(self._generators(name), vectors, None, False)

    def _after_backbone(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        self._check_layers(module, kwargs.get(_PASS_KEY))
        if not self._wants_hidden_states:
            return None
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=output.hidden_states[-1])

    def _check_layers(self, module: nn.Module, current: _Pass | None) -> None:
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
