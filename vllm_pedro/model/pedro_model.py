"""`PedroModel`: a transformers model with an adapter, in the idiom of PEFT."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from ..adapter import load_adapter, save_adapter, tensor_name
from ..adapter.hub import push, write_card
from ..adapter.shapes import check_shapes
from ..backbone import BackboneShape
from ..config import PedroConfig
from ..errors import PedroError
from ..files import shorten
from ..generator import VectorGenerator
from .projections import decoder_layers, device_of, find_projections
from .wiring import Active, Wiring

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What trainers, TRL and pipelines ask of a model and mean the backbone by. All else, such as what
# uploads, saves or manages adapters, would be done to the backbone without a word.
_OF_BACKBONE: Final = frozenset(
    {
        "_no_split_modules",
        "_tp_size",
        "add_model_tags",
        "base_model_prefix",
        "can_generate",
        "config",
        "device",
        "disable_input_require_grads",
        "dtype",
        "enable_input_require_grads",
        "floating_point_ops",
        "fsdp_size",
        "generation_config",
        "get_input_embeddings",
        "get_output_embeddings",
        "gradient_checkpointing_disable",
        "gradient_checkpointing_enable",
        "hf_device_map",
        "hf_quantizer",
        "is_distributed_loading_by_transformers",
        "is_gradient_checkpointing",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "is_parallelizable",
        "is_quantized",
        "lm_head",
        "loss_function",
        "loss_type",
        "main_input_name",
        "model_parallel",
        "model_tags",
        "name_or_path",
        "num_parameters",
        "prepare_inputs_for_generation",
        "quantization_method",
        "supports_gradient_checkpointing",
        "tp_plan",
        "tp_size",
        "vocab_size",
        "warnings_issued",
    }
)


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
    were no adapters. What trainers ask of a model is passed on to the backbone (`config`, `device`,
    `gradient_checkpointing_enable`, ...); the rest of it is at `base_model`. The state dict holds
    the adapters and not the frozen backbone, so that checkpoints of a `Trainer` are as small as an
    adapter.

    Args:
        model: the backbone: of an architecture of `places.ARCHITECTURES`, or another whose
            decoder layers have modules of the same names.
        config: the first adapter's config; the adapter starts as the identity.
        adapter_name: its name.

    Raises:
        PedroError: the architecture is not known, or the config does not fit the backbone.
    """

    # By this Trainer knows that a quantised backbone has something to train beside it.
    _hf_peft_config_loaded = True

    def __init__(
        self, model: PreTrainedModel, config: PedroConfig, adapter_name: str = "default"
    ) -> None:
        super().__init__()
        if isinstance(model, nn.Module) and _holds_adapters(model):
            raise PedroError(
                f"{type(model).__name__} has adapters already; add_adapter and load_adapter add "
                "more, and unload takes them out"
            )
        self.shape = BackboneShape.from_hf_config(model.config)
        find_projections(model, self.shape)
        self.base_model = model
        self.vector_generators = nn.ModuleDict()
        self.pedro_configs: dict[str, PedroConfig] = {}
        self.active_adapter: str | None = None
        self.adapter_enabled = True
        # Before anything is hooked or frozen: a refused config leaves the model as it was.
        self.add_adapter(adapter_name, config)
        model.requires_grad_(False)
        self.set_adapter(adapter_name)
        self._wiring = Wiring(model, self._acting)
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
            if name not in _OF_BACKBONE:
                raise AttributeError(
                    f"'PedroModel' object has no attribute {name!r}; the backbone is at .base_model"
                ) from None
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
        """Write an adapter folder with a model card, and with `inference_mode` true, as PEFT does.

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
        config = PedroConfig.from_dict(values)
        digest = save_adapter(path, config, self.adapter_tensors(name), dtype)
        write_card(path, config.base_model_name_or_path)
        return digest

    def push_to_hub(self, repo_id: str, adapter_name: str | None = None, **how: Any) -> str:
        """Upload an adapter to the Hugging Face hub; the backbone stays here.

        Args:
            repo_id: the repository, e.g. "me/my-adapter".
            adapter_name: the adapter; None for the active one.
            **how: see `hub.push`.

        Returns:
            The commit's address.

        Raises:
            PedroError: the hub refuses it, or cannot be reached.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, adapter_name)
            return push(folder, repo_id, **how)

    def adapter_tensors(self, adapter_name: str | None = None) -> dict[str, Tensor]:
        """An adapter's parameters by their on-disk names, detached; all but b_up share memory."""
        name = self._known(adapter_name if adapter_name is not None else self._active())
        return {
            tensor_name(index, suffix): tensor
            for index, generator in enumerate(self._generators(name))
            if isinstance(generator, VectorGenerator)
            for suffix, tensor in generator.tensors().items()
        }

    def fill_adapter(self, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Give an adapter the values of `tensors`, which have their on-disk names.

        Raises:
            AdapterError: tensors are missing, unexpected or of another shape.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        check_shapes(self.pedro_configs[self._known(adapter_name)], shapes, self.shape, "tensors")
        for index, generator in enumerate(self._generators(adapter_name)):
            prefix = tensor_name(index, "")
            generator.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )

    def add_adapter(self, adapter_name: str, config: PedroConfig) -> None:
        """Add a fresh adapter; it does not become the active one.

        Raises:
            PedroError: the name is taken or not usable, or the config does not fit the backbone.
        """
        if adapter_name in self.pedro_configs:
            raise PedroError(f"adapter {adapter_name!r} exists already")
        config.validate(self.shape.num_layers)
        self.shape.check_modules(config.target_modules)
        generators = nn.ModuleList()
        for index, layer in enumerate(decoder_layers(self.base_model)):
            if sum(self.shape.split_widths(config.target_modules, index)):
                device = device_of(index, layer)
                generators.append(VectorGenerator(config, self.shape, index).to(device))
            else:
                generators.append(nn.Identity())
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
        self._wiring.remove()
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

    def _acting(self) -> Active | None:
        if not self.adapter_enabled:
            return None
        name = self._active()
        return Active(name, self.pedro_configs[name], self._generators(name))

    def _fill(self, name: str, tensors: dict[str, Tensor], is_trainable: bool) -> None:
        self.fill_adapter(name, tensors)
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
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        kwargs |= {"prompt_lengths": prompt_lengths, "prompt_mask": prompt_mask}
        prompts = self._wiring.prompts_to_read(kwargs)
        with self._wiring.reading(prompts):
            return self.base_model(**kwargs)

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
        if inputs is not None:
            kwargs["inputs"] = inputs
        kwargs |= {"prompt_lengths": prompt_lengths, "prompt_mask": prompt_mask}
        with self._wiring.generating(kwargs):
            return self.base_model.generate(**kwargs)

    # TRL replaces `forward` by one that takes the final hidden states from `self.base_model` and
    # computes the loss itself, and asks for it with `fused_lm_head`. Hooks of `__call__` run
    # around whatever `forward` is, so the adapter takes part in that too.

    def _before_fused(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not kwargs.get("fused_lm_head"):
            return None
        kwargs = dict(kwargs)
        self._wiring.prompts = self._wiring.prompts_to_read(kwargs)
        self._wiring.wants_hidden_states = True
        return args, kwargs

    def _after_fused(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._wiring.wants_hidden_states:
            self._wiring.prompts, self._wiring.wants_hidden_states = None, False


def _holds_adapters(model: nn.Module) -> bool:
    return hasattr(model, "_pedro_wiring") or isinstance(model, PedroModel)


def get_pedro_model(
    model: PreTrainedModel, config: PedroConfig, adapter_name: str = "default"
) -> PedroModel:
    """Put a fresh, trainable adapter on a backbone, and freeze the backbone.

    A fresh adapter changes nothing: the outputs are bit-equal to the backbone's.

    Raises:
        PedroError: the architecture is not known, or the config does not fit the backbone.
    """
    return PedroModel(model, config, adapter_name)
