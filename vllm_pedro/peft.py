"""PEDRO as a method of PEFT, known to it as soon as both packages are imported.

`peft.get_peft_model(model, PedroConfig(...))` and what PEFT, transformers and TRL build on it work
as for PEFT's own methods; a folder is the same as one of `PedroModel`, byte for byte. Each decoder
layer gets a `vector_generator`, and the backbone the same hooks as in a `PedroModel`: whoever calls
it, the adapter acts.

PEFT has no public way to add a method from outside, and its inner interfaces change with every
minor version, so there is a window of versions, `PEFT_VERSIONS`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, cast

import peft
import torch
from accelerate import init_empty_weights
from packaging.specifiers import SpecifierSet
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from .adapter import load_adapter
from .adapter.hub import fetch_adapter, local_config, repository_of
from .adapter.names import TENSOR_PREFIX, tensor_name
from .adapter.reading import check_finite
from .adapter.shapes import check_shapes
from .backbone import BackboneShape
from .config import PEFT_TYPE, PedroConfig
from .errors import PedroError
from .generator import VectorGenerator, whole
from .model.projections import decoder_layers, device_of
from .model.wiring import Active, Wiring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEFT_VERSIONS: Final = SpecifierSet(">=0.21,<0.22")
"""What this is tested with; the extra `compare` of pyproject.toml asks for it."""
PREFIX: Final = "vector_generator"
"""The name of what each decoder layer gets; on disk, too."""


class Generators(nn.ModuleDict, BaseTunerLayer):
    """The vector generators of one decoder layer, by the names of the adapters."""

    adapter_layer_names = ("generators",)

    @property
    def generators(self) -> Generators:
        """Itself: where PEFT looks for an adapter's modules."""
        return self

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def add(self, name: str, generator: VectorGenerator) -> None:
        # On "meta" PEFT makes what it is about to load.
        if generator.up_proj.shift.device.type != "meta":
            generator.to(self._device)
        self[name] = generator.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, name: str, device: Any = None) -> None:
        self[name].to(self._device)


def _generators(layer: nn.Module) -> Generators:
    return cast(Generators, layer.vector_generator)


def _names_of_layers(model: nn.Module) -> tuple[str, str]:
    """How the names of decoder layers begin in a model, and in files, which have one for all."""
    layers = decoder_layers(model)
    own = next(name for name, module in model.named_modules() if module is layers) + "."
    tuner = "base_model.model."
    return own, TENSOR_PREFIX if own.startswith(tuner) else TENSOR_PREFIX.removeprefix(tuner)


class _Adapters:
    """The adapters in a backbone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def acting(self) -> Active | None:
        layers = decoder_layers(self._model)
        first = _generators(layers[0])
        names = cast(list[str], first.active_adapters)
        if first.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise PedroError(f"adapters {names} are active: one at a time can act")
        generators = [_generators(layer)[names[0]] for layer in layers]
        return Active(names[0], self._model.peft_config[names[0]], generators)


class PedroTuner(BaseTuner):
    """What PEFT calls a tuner: puts adapters into a backbone and takes them out."""

    prefix = PREFIX
    tuner_layer_cls = Generators

    def inject_adapter(
        self,
        model: PreTrainedModel,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Give each decoder layer a generator for `adapter_name`; PEFT calls it.

        Raises:
            PedroError: the config does not fit the backbone, or its architecture is not known.
        """
        config = self.peft_config[adapter_name]
        layers = decoder_layers(model)
        shape = BackboneShape.from_hf_config(model.config)
        config.validate(shape.num_layers)
        shape.check_modules(config.target_modules)
        widths = [sum(shape.split_widths(config.target_modules, i)) for i in range(len(layers))]
        if not all(widths):
            raise PedroError(
                f"layer {widths.index(0)} has none of {', '.join(config.target_modules)}, and "
                "PEFT's form has a generator in every layer; use get_pedro_model"
            )
        devices = [device_of(index, layer) for index, layer in enumerate(layers)]
        if "." in adapter_name:
            raise PedroError(f"adapter name {adapter_name!r}: not usable, it holds a dot")
        is_first = not hasattr(layers[0], PREFIX)
        if is_first:
            tuned = any(isinstance(module, BaseTunerLayer) for module in model.modules())
            if tuned or hasattr(model, "_pedro_wiring"):
                raise PedroError(f"{type(model).__name__} has adapters already; unload() them")
            Wiring(model, _Adapters(model).acting, always=True)
            model.requires_grad_(False)
            for layer, device in zip(layers, devices, strict=True):
                layer.vector_generator = Generators(device)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            made = [VectorGenerator(config, shape, index) for index in range(len(layers))]
        for layer, generator in zip(layers, made, strict=True):
            _generators(layer).add(adapter_name, generator)
        if is_first:
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError  # abstract in PEFT; `inject_adapter` does without

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's, which passes over modules that are named as the method is."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        del self.peft_config[adapter_name]
        for layer in decoder_layers(self.model):
            BaseTunerLayer.delete_adapter(_generators(layer), adapter_name)
            self.active_adapter = cast(list[str], _generators(layer).active_adapters)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, which takes `prompt_lengths` and `prompt_mask` here."""
        if args:
            kwargs["inputs"], args = args[0], args[1:]
        with self.model._pedro_wiring.generating(kwargs):
            return self.model.generate(*args, **kwargs)

    def _check_merge_allowed(self) -> None:
        raise PedroError(
            "a PEDRO adapter cannot be merged: its vectors are made from each prompt; unload() "
            "takes it out"
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT would pass over it
            raise PedroError("adapter_names: one adapter acts on all rows; set_adapter() chooses")
        yield

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        self.model._pedro_wiring.remove()
        del self.model.peft_config
        for layer in decoder_layers(self.model):
            del layer.vector_generator
        return self.model

    # ---- files: names without the adapter's, and b_up for b_up - 1

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PedroConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Sequence[str],
    ) -> dict[str, Tensor]:
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            # One process: what goes on is what was saved. Several have to stay equal.
            for module in model.modules():
                if isinstance(module, Generators) and adapter_name in module:
                    cast(VectorGenerator, module[adapter_name]).settle()
        # Sharded ones are gathered; PEFT calls this in every process.
        mark = f".{PREFIX}.{adapter_name}."
        found = {key: whole(tensor) for key, tensor in state_dict.items() if mark in key}
        for key in [key for key in found if key.endswith(".up_proj.shift")]:
            shift = found.pop(key)
            found[key.removesuffix("shift") + "bias"] = shift.float() + 1.0
        own, saved = _names_of_layers(model)
        return {
            saved + key.removeprefix(own) if key.startswith(own) else key: tensor.float()
            for key, tensor in found.items()
        }

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{PREFIX}.{adapter_name}.", f".{PREFIX}.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PedroConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The checks of `load_adapter`, of which PEFT makes none; then the model's own names."""
        source = f"adapter {adapter_name!r}"
        shape = BackboneShape.from_hf_config(model.config)
        shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
        check_shapes(config, shapes, shape, source)
        result = {}
        own, saved = _names_of_layers(model)
        for name, tensor in state_dict.items():
            check_finite(name, tensor.float(), source)
            name = own + name.removeprefix(saved) if name.startswith(saved) else name
            key = name.replace(f".{PREFIX}.", f".{PREFIX}.{adapter_name}.", 1)
            if key.endswith(".up_proj.bias"):
                result[key.removesuffix("bias") + "shift"] = tensor.float() - 1.0
            else:
                result[key] = tensor.float()
        return result


def load_into(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> None:
    """Put the adapter saved in `folder` into a transformers model, as its `load_adapter` does.

    Raises:
        AdapterError: the folder holds no valid adapter for this backbone.
    """
    adapter = load_adapter(folder, BackboneShape.from_hf_config(model.config))
    values = adapter.config.to_dict() | {"inference_mode": not is_trainable}
    peft.inject_adapter_in_model(PedroConfig.from_dict(values), model, adapter_name)
    for index, layer in enumerate(decoder_layers(model)):
        prefix = tensor_name(index, "")
        _generators(layer)[adapter_name].load_state_dict(
            {k.removeprefix(prefix): v for k, v in adapter.tensors.items() if k.startswith(prefix)}
        )
    model._hf_peft_config_loaded = True
    if not is_trainable:
        model.eval()


def _teach_transformers() -> None:
    """Let `AutoModelForCausalLM.from_pretrained(folder)` and `load_adapter` read our folders.

    transformers writes a file's tensors into parameters of the same name by itself, unchecked.
    """
    from transformers.integrations.peft import PeftAdapterMixin
    from transformers.utils.loading_report import LoadStateDictInfo

    original = PeftAdapterMixin.load_adapter

    @functools.wraps(original)
    def load_adapter(
        self: PreTrainedModel, peft_model_id: Any = None, adapter_name: Any = None, **kwargs: Any
    ) -> Any:
        load_config = kwargs.get("load_config")
        name: Any = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
        how = dict(getattr(load_config, "download_kwargs", None) or {})
        how |= kwargs.get("adapter_kwargs") or {}
        folder = None
        if name is not None and kwargs.get("adapter_state_dict") is None:
            folder = local_config(name, how.get("subfolder"), how.get("revision"))
        if folder is None:
            return original(self, peft_model_id, adapter_name, **kwargs)
        if (repository := repository_of(os.fspath(name))) is not None:
            at = repository._replace(revision=folder.name)
            folder = fetch_adapter(at, BackboneShape.from_hf_config(self.config))
        load_into(self, folder, adapter_name or "default", kwargs.get("is_trainable", False))
        return LoadStateDictInfo(set(), set(), set(), [], set(), {})

    PeftAdapterMixin.load_adapter = load_adapter


def register() -> None:
    """Make PEDRO known to PEFT; called once PEFT is imported."""
    if peft.__version__ not in PEFT_VERSIONS:
        PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = _Unsupported
        return
    # A config of ours, made before or after, is a config of PEFT's from here on.
    PedroConfig.__bases__ = (*PedroConfig.__bases__, PeftConfig)
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = _Config
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = PedroTuner
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX
    _teach_transformers()


class _Config(PedroConfig):
    """What PEFT makes our configs with: they are `PedroConfig`s, from a folder or the hub."""

    def __new__(cls, *args: Any, **values: Any) -> Any:
        return PedroConfig(*args, **values)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        **how: Any,
    ) -> PedroConfig:
        folder = local_config(path, subfolder, revision)
        return PedroConfig.from_pretrained(folder if folder is not None else path)


class _Unsupported:
    def __init__(self, **values: Any) -> None:
        raise PedroError(f"PEDRO in PEFT needs peft{PEFT_VERSIONS}, found {peft.__version__}")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls()


assert TENSOR_PREFIX == "base_model.model.model.layers."  # what PEFT makes of the layers' names
