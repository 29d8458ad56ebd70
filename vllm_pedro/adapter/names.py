"""Names in an adapter's folder: of its files, and of its tensors."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
import torch

WEIGHTS_NAME: Final = "adapter_model.safetensors"
TENSOR_PREFIX: Final = "base_model.model.model.layers."
PICKLED_NAMES: Final = tuple(f"adapter_model.{ending}" for ending in ("bin", "pt", "pth", "pkl"))
TORCH_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Array = np.ndarray[Any, np.dtype[Any]]
LAYER_NAME = re.compile(re.escape(TENSOR_PREFIX) + r"(0|[1-9][0-9]{0,8})\.vector_generator\.(.+)")
FILE_EXPECTED: Final = "a safetensors file"
DOWN: Final = "down_proj.weight"
UP: Final = "up_proj.weight"
BIAS: Final = "up_proj.bias"
NUMERATOR: Final = "activation.numerator"
DENOMINATOR: Final = "activation.denominator"


def tensor_name(layer: int, suffix: str) -> str:
    """The on-disk name of a tensor, e.g. of layer 0's "down_proj.weight"."""
    return f"{TENSOR_PREFIX}{layer}.vector_generator.{suffix}"
