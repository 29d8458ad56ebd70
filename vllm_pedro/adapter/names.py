"""Names in an adapter's folder: of its files, and of its tensors."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]
"""An array of any shape and dtype."""

WEIGHTS_NAME: Final = "adapter_model.safetensors"
"""The file with the weights."""
FILE_EXPECTED: Final = "a safetensors file"
"""What error messages call it."""
PICKLED_NAMES: Final = tuple(f"adapter_model.{ending}" for ending in ("bin", "pt", "pth", "pkl"))
"""Files that are refused, because unpickling them could run code."""
TORCH_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that adapters are saved in."""

TENSOR_PREFIX: Final = "base_model.model.model.layers."
"""Begins the names of all tensors, as PEFT's do."""
LAYER_NAME = re.compile(re.escape(TENSOR_PREFIX) + r"(0|[1-9][0-9]{0,8})\.vector_generator\.(.+)")
"""Matches a tensor's name; the groups are its layer and the suffix, one of those below."""

DOWN: Final = "down_proj.weight"
DOWN_BIAS: Final = "down_proj.bias"
UP: Final = "up_proj.weight"
BIAS: Final = "up_proj.bias"
NUMERATOR: Final = "activation.numerator"
DENOMINATOR: Final = "activation.denominator"


def tensor_name(layer: int, suffix: str) -> str:
    """The on-disk name of a tensor, e.g. of layer 0's "down_proj.weight"."""
    return f"{TENSOR_PREFIX}{layer}.vector_generator.{suffix}"
