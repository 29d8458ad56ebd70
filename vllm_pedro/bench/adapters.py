"""Random adapters to measure with: PEDRO, static vectors ((IA)3) and LoRA, on the same modules."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..backbone import BLOCKS, BackboneShape
from ..errors import PedroError

if TYPE_CHECKING:
    import torch

MODULES: Final = ("q_proj", "v_proj", "up_proj")
"""The paper's target modules; LoRA gets the same ones."""

PEDRO_RANK: Final = 12
LORA_RANK: Final = 8

KINDS: Final = ("pedro", "static", "lora")

CONTENTS: Final = 16
"""At most so many different weights are made; see `write_adapters`."""


def write_adapters(model: str, folder: Path, kind: str, count: int) -> list[Path]:
    """Write `count` adapter folders for a model, in bfloat16.

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

    Returns:
        The folders, in the order of the tenants' numbers.
    """
    if kind not in KINDS:
        raise PedroError(f"unknown kind of adapter {kind!r}; known: {', '.join(KINDS)}")
    from ..adapter import WEIGHTS_NAME
    from ..config import CONFIG_NAME

    shape = BackboneShape.from_pretrained(model)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for number in range(count):
        path = folder / f"{kind}-{number:05d}"
        path.mkdir()
        paths.append(path)
        if number < CONTENTS:
            write = _write_lora if kind == "lora" else _write_pedro
            write(path, shape, kind, number)
            continue
        source = paths[number % CONTENTS]
        config: dict[str, Any] = json.loads((source / CONFIG_NAME).read_text())
        config["base_model_name_or_path"] = f"tenant-{number}"
        (path / CONFIG_NAME).write_text(json.dumps(config))
        _link(source / WEIGHTS_NAME, path / WEIGHTS_NAME)
    return paths


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def folder_bytes(path: Path) -> int:
    """Bytes of an adapter on disk."""
    return sum(file.stat().st_size for file in path.iterdir())


def _write_pedro(path: Path, shape: BackboneShape, kind: str, number: int) -> None:
    import torch

    from ..adapter import init_adapter, save_adapter
    from ..config import PedroConfig

    config = PedroConfig(
        r=0 if kind == "static" else PEDRO_RANK,
        target_modules=list(MODULES),
        input_norm=None if kind == "static" else "rms",
        base_model_name_or_path=f"tenant-{number}",
        inference_mode=True,
    )
    # Small weights: the vectors stay near one, and the model's answers stay sane.
    adapter = init_adapter(config, shape, seed=number, scale=0.01)
    tensors = {name: t.to(torch.bfloat16) for name, t in adapter.tensors.items()}
    save_adapter(path, replace(adapter.config), tensors)


def _write_lora(path: Path, shape: BackboneShape, kind: str, number: int) -> None:
    import torch
    from safetensors.torch import save_file

    from ..adapter import WEIGHTS_NAME
    from ..config import CONFIG_NAME

    random = torch.Generator().manual_seed(number)
    save_file(dict(_lora_tensors(shape, random)), path / WEIGHTS_NAME)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"tenant-{number}",
        "r": LORA_RANK,
        "lora_alpha": 2 * LORA_RANK,
        "target_modules": list(MODULES),
        "bias": "none",
        "inference_mode": True,
    }
    (path / CONFIG_NAME).write_text(json.dumps(config))


def _lora_tensors(
    shape: BackboneShape, random: torch.Generator
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for layer in range(shape.num_layers):
        for module in MODULES:
            name = f"base_model.model.model.layers.{layer}.{BLOCKS[module]}.{module}"
            sizes = {"A": (LORA_RANK, shape.hidden_size), "B": (shape.widths[module], LORA_RANK)}
            for side, size in sizes.items():
                weight = torch.randn(size, generator=random) * 0.01
                yield f"{name}.lora_{side}.weight", weight.to(torch.bfloat16)


def model_label(model: str) -> str:
    """A model in words, without where it lies."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True)
    return (
        f"{Path(model).name} ({config.num_hidden_layers} layers, hidden size {config.hidden_size})"
    )
