"""Where the operators come from: the native library, Triton, or plain torch.

One name each: `torch.ops.vllm_pedro.<name>`. The native library (`csrc/`, built by `setup.py`
into this package) brings schemas and CPU kernels, and CUDA kernels where it was built with them.
What it does not bring is registered here: on CUDA the Triton kernels, on the CPU the reference.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference

logger = logging.getLogger(__name__)

INTERFACE_VERSION = 5
"""Schemas and layout this package was written for; `csrc/ops.cpp` has the same number."""

NATIVE_LIBRARY = Path(__file__).resolve().parent.parent / "_C.so"
"""Beside it `setup.py` leaves `_C.note` if it could not build all: what is missing, and why."""

SCHEMAS = {
    "generate_vectors": (
        "(Tensor hidden, Tensor(a!) vectors, Tensor arena, Tensor prefills, Tensor layer, "
        "Tensor counts) -> ()"
    ),
    "scale_columns_": (
        "(Tensor(a!) x, Tensor vectors, Tensor token_rows, int[] ranges, Tensor counts) -> ()"
    ),
}


@dataclass(frozen=True, slots=True)
class Backends:
    """What runs the operators.

    Attributes:
        cpu: "native (<instruction set>)" or "reference (plain PyTorch)".
        cuda: "native", "Triton" or "reference (plain PyTorch)".
        note: Why the native library is not used, or not for CUDA where torch has CUDA; else empty.
    """

    cpu: str
    cuda: str
    note: str


_library = torch.library.Library("vllm_pedro", "FRAGMENT")


def _build_note() -> str:
    """What the build could not do, and why."""
    try:
        return NATIVE_LIBRARY.with_suffix(".note").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _load_native() -> str:
    """Load the native library; why not, if it cannot be."""
    if not NATIVE_LIBRARY.is_file():
        note = _build_note()
        return note if note.startswith("not built") else f"{NATIVE_LIBRARY.name} is missing"
    try:
        torch.ops.load_library(str(NATIVE_LIBRARY))
    except OSError as error:
        logger.warning("the native operators cannot be loaded and are not used: %s", error)
        return f"{NATIVE_LIBRARY.name} cannot be loaded: {error}"
    found = torch.ops.vllm_pedro._interface_version()
    if found != INTERFACE_VERSION:
        raise RuntimeError(
            f"{NATIVE_LIBRARY} was built from other sources than this package (interface {found}, "
            f"not {INTERFACE_VERSION}): build it again with python3 run.py setup, or "
            "pip install --no-build-isolation --no-deps -e ."
        )
    return ""


def _has(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"vllm_pedro::{name}", key)


def _triton_kernel(name: str) -> Any:
    def call(*args: Any) -> Any:
        from . import triton_kernels  # imports Triton, which a CPU need not have

        return getattr(triton_kernels, name)(*args)

    return call


def _register() -> Backends:
    note = _load_native()
    has_triton = importlib.util.find_spec("triton") is not None
    instead = "Triton" if has_triton else "reference (plain PyTorch)"
    for name, schema in SCHEMAS.items():
        if note:
            _library.define(name + schema)
            _library.impl(name, getattr(reference, name), "CPU")
        if not _has(name, "CUDA"):
            kernel = _triton_kernel(name) if has_triton else getattr(reference, name)
            _library.impl(name, kernel, "CUDA")
    if note:
        return Backends("reference (plain PyTorch)", instead, note)
    cpu = f"native ({torch.ops.vllm_pedro._instruction_set()})"
    if _native_has_cuda():
        return Backends(cpu, "native", "")
    if torch.version.cuda is not None:
        note = f"{_build_note() or 'without CUDA kernels'}; {instead} is used"
    return Backends(cpu, instead, note)


def _native_has_cuda() -> bool:
    """Whether the native library brought CUDA kernels, rather than this module."""
    return hasattr(torch.ops.vllm_pedro, "_has_cuda_kernels")


backends = _register()


@torch.library.register_fake("vllm_pedro::generate_vectors", lib=_library)
def _(
    hidden: Tensor,
    vectors: Tensor,
    arena: Tensor,
    prefills: Tensor,
    layer: Tensor,
    counts: Tensor,
) -> None:
    return None


@torch.library.register_fake("vllm_pedro::scale_columns_", lib=_library)
def _(x: Tensor, vectors: Tensor, token_rows: Tensor, ranges: list[int], counts: Tensor) -> None:
    return None
