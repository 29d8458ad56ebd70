"""Random adapters to measure with: PEDRO, static vectors ((IA)3) and LoRA, on the same modules."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from ..backbone import BLOCKS, BackboneShape

if TYPE_CHECKING:
    import torch

    from ..config import PedroConfig
    from ..serving.columns import StoreColumns

MODULES: Final = ("q_proj", "v_proj", "up_proj")
"""The paper's target modules; LoRA gets the same ones."""

PEDRO_RANK: Final = 12
LORA_RANK: Final = 8

CONTENTS: Final = 16
"""At most so many different weights are made; see `write_adapters`."""


def write_adapters(model: str, folder: Path, kind: str, count: int) -> list[Path]:
    """Write `count` adapter folders for a model, in bfloat16, in the order of the tenants' numbers.

    Weights are random: what they are does not change how long they take. Up to `CONTENTS`
    folders have weights of their own. Later ones share the weights file of an earlier one (a hard
    link), but not the config: its `base_model_name_or_path` carries the tenant's number. So every
    adapter has a digest of its own, is read, checked, kept and evicted like any other, and 10,000
    of them fit on a disk. What that hides is reading 10,000 files that are in no file cache.

    Args:
        model: The model's folder.
        folder: Where to make them; it is created.
        kind: `pedro` (r = 12), `static` (one vector per module, (IA)3) or `lora` (r = 8).
        count: How many.
    """
    import torch

    from ..adapter import WEIGHTS_NAME
    from ..config import CONFIG_NAME, PedroConfig

    shape = BackboneShape.from_pretrained(model)
    paths = [folder / f"{kind}-{number:05d}" for number in range(count)]
    for number, path in enumerate(paths):
        tenant = f"tenant-{number}"
        if number >= CONTENTS:
            path.mkdir()
            source = paths[number % CONTENTS]
            fields = json.loads((source / CONFIG_NAME).read_text())
            fields["base_model_name_or_path"] = tenant
            (path / CONFIG_NAME).write_text(json.dumps(fields))
            try:
                os.link(source / WEIGHTS_NAME, path / WEIGHTS_NAME)
            except OSError:  # a file system without hard links
                shutil.copyfile(source / WEIGHTS_NAME, path / WEIGHTS_NAME)
        elif kind == "lora":
            write_lora(path, shape, number, base_model=tenant, dtype=torch.bfloat16)
        else:
            config = PedroConfig(
                r=0 if kind == "static" else PEDRO_RANK,
                target_modules=list(MODULES),
                input_norm=None if kind == "static" else "rms",
                base_model_name_or_path=tenant,
                inference_mode=True,
            )
            write_pedro(path, shape, config, number, dtype=torch.bfloat16)
    return paths


def store_columns(shape: BackboneShape, modules: Sequence[str]) -> StoreColumns:
    """Columns of a backbone whose projections lie whole and packed on one device, as vLLM has them
    of a Llama."""
    from ..architectures import MODULES as ALL
    from ..places import packed, scaled_range
    from ..serving.columns import StoreColumns

    layers = []
    for layer in range(shape.num_layers):
        widths = shape.widths_of(layer)
        projections = [
            packed({module: widths[module] for module in pack})
            for pack in (ALL[:3], ALL[3:5], ALL[5:])
        ]
        parts = (codes[scaled_range(codes, modules)] for codes in projections)
        layers.append(np.concatenate(list(parts)))
    return StoreColumns(shape, layers)


def folder_bytes(path: Path) -> int:
    """Bytes of an adapter on disk."""
    return sum(file.stat().st_size for file in path.iterdir())


def write_pedro(
    folder: Path,
    shape: BackboneShape,
    config: PedroConfig,
    seed: int,
    scale: float = 0.01,
    down_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a random PEDRO adapter to `folder`. Same arguments, same content.

    Args:
        folder, shape, config, seed: See `init_adapter`; the folder is created and returned.
        scale: Of what makes its vectors differ from one. With the default they stay near one, and
            a model's answers stay sane.
        down_scale: Multiplies the down projection: as initialised it makes vectors that hardly
            depend on the prompt.
        dtype: Of its weights; None is float32.
    """
    from ..adapter import init_adapter, save_adapter

    adapter = init_adapter(config, shape, seed=seed, scale=scale)
    tensors = {
        name: (tensor * down_scale if name.endswith("down_proj.weight") else tensor).to(dtype)
        for name, tensor in adapter.tensors.items()
    }
    save_adapter(folder, adapter.config, tensors)
    return folder


def write_lora(
    folder: Path,
    shape: BackboneShape,
    seed: int,
    scale: float = 0.01,
    rank: int = LORA_RANK,
    modules: Sequence[str] = MODULES,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a random LoRA adapter of alpha `2 * rank`; see `write_pedro`."""
    import torch
    from safetensors.torch import save_file

    from ..adapter import WEIGHTS_NAME
    from ..config import CONFIG_NAME

    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(shape.num_layers):
        for module in modules:
            name = f"base_model.model.model.layers.{layer}.{BLOCKS[module]}.{module}"
            sizes = {"A": (rank, shape.hidden_size), "B": (shape.widths[module], rank)}
            for side, size in sizes.items():
                weight = torch.randn(size, generator=random) * scale
                tensors[f"{name}.lora_{side}.weight"] = weight.to(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS_NAME)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "bias": "none",
        "inference_mode": True,
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    return folder
