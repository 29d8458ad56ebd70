"""Operators on the serving path; one name each in reference, Triton, native code and tests.

All take `counts`, three int32 on the CPU: how many prompts generate vectors in this step, how many
of its rows have an adapter, and the highest rank of the adapters that generate. It is read on the
host, so that a step with nothing to do launches nothing and waits for nothing; the kernels
themselves skip rows that read the identity row.

The store holds l - 1, which 16 bits round ten times less than l (docs/kernels.md), and 1 is added
in float32 where something is multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .layout import BlobLayout
from .library import Backends, backends

__all__ = [
    "Backends",
    "BlobLayout",
    "backends",
    "generate_vectors",
    "scale_columns_",
    "scaled",
    "warm_up",
]

# Bound once: looking an operator up and choosing its overload takes longer than many a call.
_generate_vectors = torch.ops.vllm_pedro.generate_vectors.default
_scale_columns = torch.ops.vllm_pedro.scale_columns_.default


def generate_vectors(
    hidden: Tensor,
    vectors: Tensor,
    arena: Tensor,
    prefills: Tensor,
    layer: Tensor,
    counts: Tensor,
) -> None:
    """Generate one layer's vectors of a step's prompts in float32, and write l - 1 to the store.

    Args:
        hidden: `[tokens, d]`, the residual stream before the layer's input norm.
        vectors: `[rows, D]`, the layer's vector store, in the dtype of `hidden`; rows change.
        arena: uint8, blobs of adapters, see `vllm_pedro.ops.layout`; begins at a multiple of 16.
        prefills: `[max prefills, 4]` int32: first token, tokens, row of `vectors`, place of the
            adapter's blob in `arena` in units of 16 bytes. Prompts of one adapter lie side by side.
        layer: `[1]` int32 on the CPU, the layer's number. A tensor, so that the graphs of all
            layers are one to a compiler.
        counts: `[3]` int32 on the CPU; the first `counts[0]` prefills count, of adapters of rank
            `counts[2]` at most.
    """
    _generate_vectors(hidden, vectors, arena, prefills, layer, counts)


def scale_columns_(
    x: Tensor, vectors: Tensor, token_rows: Tensor, ranges: Sequence[int], counts: Tensor
) -> None:
    """Multiply columns of a packed projection by each token's vectors, in place.

    Rows that read the identity row are neither read nor written.

    Args:
        x: `[tokens, width]`; modified.
        vectors: `[rows, D]`, one layer's vector store, in the dtype of `x`.
        token_rows: `[>= tokens]` int64, the row of `vectors` that each token reads.
        ranges: Flat triples of column of `x`, column of `vectors`, width.
        counts: `[3]` int32 on the CPU; nothing happens where `counts[1]` is 0.
    """
    _scale_columns(x, vectors, token_rows, ranges, counts)


def scaled(x: Tensor, vectors: Tensor, token_rows: Tensor, columns: slice) -> Tensor:
    """Gather and multiply, written so that Inductor fuses it into what comes after.

    Args:
        x: `[tokens, width]`, a packed projection.
        vectors: `[rows, D]`, one layer's vector store, in the dtype of `x`.
        token_rows: `[>= tokens]` int64, the row of `vectors` that each token reads.
        columns: The columns of `vectors` that belong to `x`.

    Returns:
        A new `[tokens, width]`. Rows that read the identity row are bit-equal to `x`.
    """
    by = vectors[:, columns][token_rows[: x.shape[-2]]]
    return (x.float() * (1.0 + by.float())).to(x.dtype)


def warm_up(hidden_size: int, width: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Call `generate_vectors` once, so that the first prompt does not wait for a compiler.

    Triton compiles a kernel at its first call, for the dtypes, alignments and sizes of its
    arguments. Of a step's arguments only the tensors' lengths, the number of prompts, their highest
    rank and the layer vary, and no kernel is compiled anew for those. With native kernels it is a
    cheap call, which on a GPU loads them. Nothing of the caller's is touched, and the device is not
    waited for.

    Args:
        hidden_size: d.
        width: D, columns of the vector store.
        dtype: Of the residual stream and the vector store.
        device: Where they are; with a GPU the current one.
    """
    layout = BlobLayout((((0, width),),), hidden_size, 1, "float32")
    blob = np.zeros(layout.nbytes, np.uint8)
    layout.begin(blob, ["relu"], (1, 1), "last", False)
    generate_vectors(
        torch.zeros(2, hidden_size, dtype=dtype, device=device),
        torch.zeros(2, width, dtype=dtype, device=device),
        torch.from_numpy(blob).to(device),
        torch.tensor([[0, 2, 1, 0]], dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([1, 1, 1], dtype=torch.int32),
    )
