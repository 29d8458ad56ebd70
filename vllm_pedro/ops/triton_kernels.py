"""The operators in Triton, for GPUs on which the native library has no kernels.

Importing this module imports Triton. Shapes and meaning are those of :mod:`vllm_pedro.ops`; the
wrappers here assume checked arguments and launch on the current stream, without a host sync.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import HEADER, NUMERATOR, GeneratorLayout

BLOCK = 1024
"""Columns of one program of the elementwise kernels."""

SPLITS = 32
"""Most programs that share one prompt's mean or maximum. How many do depends on the step, so in the
kernels it is no compile-time constant: each value would be compiled when it first comes up."""

assert (HEADER, NUMERATOR) == (8, 33)  # written out in the kernels


@triton.jit
def _scale_kernel(
    x_ptr, vectors_ptr, rows_ptr, x_stride, vectors_stride,
    x0, v0, w0, x1, v1, w1, x2, v2, w2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's block of the columns of up to three ranges laid side by side."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token)
    if row != 0:
        j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        first, second = j < w0, (j >= w0) & (j < w0 + w1)
        columns = tl.where(first, j + x0, tl.where(second, j - w0 + x1, j - w0 - w1 + x2))
        by_columns = tl.where(first, j + v0, tl.where(second, j - w0 + v1, j - w0 - w1 + v2))
        inside = j < w0 + w1 + w2
        at = x_ptr + token * x_stride + columns
        x = tl.load(at, mask=inside).to(tl.float32)
        by = tl.load(vectors_ptr + row * vectors_stride + by_columns, mask=inside).to(tl.float32)
        tl.store(at, (x * by).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _pool_kernel(
    partial_ptr, hidden_ptr, generators_ptr, prefills_ptr, hidden_stride, record, d, splits,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The pooled state of one share of one prompt's tokens, ``[prompts, splits, d]``.

    With the pooling "last" the whole of it is in share 0.
    """
    prompt = tl.program_id(0)
    share = tl.program_id(1)
    start = tl.load(prefills_ptr + prompt * 4).to(tl.int64)
    length = tl.load(prefills_ptr + prompt * 4 + 1)
    slot = tl.load(prefills_ptr + prompt * 4 + 3).to(tl.int64)
    header = generators_ptr + slot * record
    rank = tl.load(header + 1)
    pooling = tl.load(header + 4)
    norm = tl.load(header + 5)
    each = tl.cdiv(length, splits)
    first = tl.where(pooling == 0, tl.where(share == 0, length - 1, length), share * each)
    end = tl.where(pooling == 0, length, tl.minimum(first + each, length))
    end = tl.where(rank == 0, first, end)
    j = tl.arange(0, BLOCK)
    inside = j < d
    pooled = tl.where(pooling == 2, tl.full((BLOCK,), float("-inf"), tl.float32), 0.0)
    for t in range(first, end):
        h = tl.load(hidden_ptr + (start + t) * hidden_stride + j, mask=inside, other=0.0)
        h = h.to(tl.float32)
        if norm != 0.0:
            h *= 1.0 / tl.sqrt(tl.sum(h * h, axis=0) / d + 1e-6)
        greater = (h > pooled) | (h != h)  # NaN wins, as it does in torch
        pooled = tl.where(pooling == 2, tl.where(greater, h, pooled), pooled + h)
    at = partial_ptr + (prompt * splits + share).to(tl.int64) * d + j
    tl.store(at, pooled, mask=inside)


@triton.jit
def _horner(coefficients, degree, x):
    result = tl.load(coefficients + degree)
    for i in range(degree):
        result = result * x + tl.load(coefficients + degree - 1 - i)
    return result


@triton.jit(do_not_specialize=["splits"])
def _latent_kernel(
    latent_ptr, partial_ptr, generators_ptr, prefills_ptr, record, d, max_rank, numerator, splits,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``g(p @ W_down)[k]`` of one prompt."""
    prompt = tl.program_id(0)
    k = tl.program_id(1)
    length = tl.load(prefills_ptr + prompt * 4 + 1)
    slot = tl.load(prefills_ptr + prompt * 4 + 3).to(tl.int64)
    generator = generators_ptr + slot * record
    rank = tl.load(generator + 1)
    if k < rank:
        pooling = tl.load(generator + 4)
        j = tl.arange(0, BLOCK)
        inside = j < d
        partial = partial_ptr + (prompt * splits).to(tl.int64) * d + j
        pooled = tl.load(partial, mask=inside, other=0.0)
        shares = tl.where(pooling == 0, 1, splits)
        for share in range(1, shares):
            other = tl.load(partial + share * d, mask=inside, other=0.0)
            greater = (other > pooled) | (other != other)
            pooled = tl.where(pooling == 2, tl.where(greater, other, pooled), pooled + other)
        pooled = tl.where(pooling == 1, pooled / length, pooled)
        w = tl.load(generator + 8 + k * d + j, mask=inside, other=0.0)
        x = tl.sum(w * pooled, axis=0)
        kind = tl.load(generator)
        if kind == 0.0:
            y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
        elif kind == 1.0:
            y = tl.where((x > 0.0) | (x != x), x, 0.0)
        else:
            m = tl.load(generator + 2).to(tl.int32)
            n = tl.load(generator + 3).to(tl.int32)
            above = _horner(generator + numerator, m, x)
            below = _horner(generator + numerator + 33, n - 1, x)
            y = above / (1.0 + tl.abs(x * below))
        tl.store(latent_ptr + prompt * max_rank + k, y)


@triton.jit
def _columns_kernel(
    vectors_ptr, latent_ptr, generators_ptr, prefills_ptr, record, width, max_rank, up, bias,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one prompt's ``latent @ W_up + b_up``, into its row of the store."""
    prompt = tl.program_id(0)
    target = tl.load(prefills_ptr + prompt * 4 + 2).to(tl.int64)
    slot = tl.load(prefills_ptr + prompt * 4 + 3).to(tl.int64)
    generator = generators_ptr + slot * record
    rank = tl.load(generator + 1).to(tl.int32)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = j < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(rank):
        w = tl.load(generator + up + k * width + j, mask=inside, other=0.0)
        total += tl.load(latent_ptr + prompt * max_rank + k) * w
    total += tl.load(generator + bias + j, mask=inside, other=0.0)
    tl.store(vectors_ptr + target * width + j, total.to(vectors_ptr.dtype.element_ty), mask=inside)


def generate_vectors(
    hidden: Tensor, vectors: Tensor, generators: Tensor, prefills: Tensor, counts: Tensor
) -> None:
    """See `vllm_pedro.ops.generate_vectors`."""
    count = int(counts[0])
    if count == 0:
        return
    d, width = hidden.shape[1], vectors.shape[1]
    layout = GeneratorLayout.of(generators, d, width)
    record = generators.shape[1]
    splits = max(1, min(SPLITS, 512 // count))
    block = triton.next_power_of_2(d)
    partial = hidden.new_empty(count, splits, d, dtype=torch.float32)
    latent = hidden.new_empty(count, layout.max_rank, dtype=torch.float32)
    warps = 8 if block >= 4096 else 4
    _pool_kernel[(count, splits)](
        partial, hidden, generators, prefills, hidden.stride(0), record, d, splits,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    _latent_kernel[(count, layout.max_rank)](
        latent, partial, generators, prefills, record, d, layout.max_rank, layout.numerator, splits,
        BLOCK=block, num_warps=warps,
    )  # fmt: skip
    _columns_kernel[(count, triton.cdiv(width, BLOCK))](
        vectors, latent, generators, prefills, record, width, layout.max_rank, layout.up,
        layout.bias, BLOCK=BLOCK,
    )  # fmt: skip


def scale_columns_(
    x: Tensor, vectors: Tensor, token_rows: Tensor, ranges: Sequence[int], counts: Tensor
) -> None:
    """See `vllm_pedro.ops.scale_columns_`."""
    tokens = len(x)
    if int(counts[1]) == 0 or tokens == 0:
        return
    for first in range(0, len(ranges), 9):  # three ranges a launch
        nine = (*ranges[first : first + 9], *(0,) * 9)[:9]
        blocks = triton.cdiv(sum(nine[2::3]), BLOCK)
        if blocks:
            _scale_kernel[(tokens, blocks)](
                x, vectors, token_rows, x.stride(0), vectors.stride(0), *nine, BLOCK=BLOCK
            )
