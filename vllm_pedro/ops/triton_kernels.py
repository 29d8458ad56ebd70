"""The operators in Triton, for GPUs on which the native library has no kernels.

Importing this module imports Triton. Shapes and meaning are those of `vllm_pedro.ops`; the
wrappers here assume checked arguments and launch on the current stream, without a host sync.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import BLOB_WORDS, DENOMINATOR_AT, NUMERATOR_AT, RANGES_AT, RECORD_FIELDS, UNIT

BLOCK = 1024
"""Columns of one program of the elementwise kernels."""

SPLITS = 32
"""Most programs that share one prompt's mean or maximum. How many do depends on the step, so in the
kernels it is no compile-time constant: each value would be compiled when it first comes up."""

# Written out in the kernels, as are the indices of RECORD_FIELDS.
assert (UNIT, BLOB_WORDS, RANGES_AT, NUMERATOR_AT, DENOMINATOR_AT) == (16, 8, 16, 32, 68)
assert RECORD_FIELDS[:7] == (
    "dtype",
    "activation",
    "rank",
    "numerator_degree",
    "denominator_degree",
    "pooling",
    "input_norm",
)
assert RECORD_FIELDS[8:] == ("columns", "ranges", "down_bias", "bias", "down", "up")


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
        tl.store(at, (x * (1.0 + by)).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _record(arena_ptr, prefills_ptr, prompt, layer):
    """Where a prompt's generator begins, as an address of bytes, and its rank; -1 for none."""
    place = tl.load(prefills_ptr + prompt * 4 + 3).to(tl.int64)
    blob = arena_ptr + place * 16
    offset = tl.load(blob.to(tl.pointer_type(tl.int32)) + 8 + layer).to(tl.int64)
    record = blob + offset * 16
    rank = tl.load(record.to(tl.pointer_type(tl.int32)) + 2)
    return record, tl.where(offset == 0, -1, rank)


@triton.jit
def _part(record, words, field: tl.constexpr):
    """Where a part of a record begins, as an address of bytes."""
    return record + tl.load(words + field).to(tl.int64) * 16


@triton.jit
def _weights(at, dtype, index, mask):
    """Weights in any of the dtypes, as float32."""
    if dtype == 0:
        w = tl.load(at.to(tl.pointer_type(tl.float32)) + index, mask=mask, other=0.0)
    elif dtype == 1:
        w = tl.load(at.to(tl.pointer_type(tl.bfloat16)) + index, mask=mask, other=0.0)
        w = w.to(tl.float32)
    else:
        w = tl.load(at.to(tl.pointer_type(tl.float16)) + index, mask=mask, other=0.0)
        w = w.to(tl.float32)
    return w


@triton.jit(do_not_specialize=["layer", "splits"])
def _pool_kernel(
    partial_ptr, hidden_ptr, arena_ptr, prefills_ptr, hidden_stride, d, layer, splits,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The pooled state of one share of one prompt's tokens, `[prompts, splits, d]`.

    With the pooling "last" the whole of it is in share 0.
    """
    prompt = tl.program_id(0)
    share = tl.program_id(1)
    start = tl.load(prefills_ptr + prompt * 4).to(tl.int64)
    length = tl.load(prefills_ptr + prompt * 4 + 1)
    record, rank = _record(arena_ptr, prefills_ptr, prompt, layer)
    words = record.to(tl.pointer_type(tl.int32))
    pooling = tl.load(words + 5)
    norm = tl.load(words + 6)
    each = tl.cdiv(length, splits)
    first = tl.where(pooling == 0, tl.where(share == 0, length - 1, length), share * each)
    end = tl.where(pooling == 0, length, tl.minimum(first + each, length))
    end = tl.where(rank <= 0, first, end)
    j = tl.arange(0, BLOCK)
    inside = j < d
    pooled = tl.where(pooling == 2, tl.full((BLOCK,), float("-inf"), tl.float32), 0.0)
    for t in range(first, end):
        h = tl.load(hidden_ptr + (start + t) * hidden_stride + j, mask=inside, other=0.0)
        h = h.to(tl.float32)
        if norm != 0:
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


@triton.jit(do_not_specialize=["layer", "splits", "max_rank"])
def _latent_kernel(
    latent_ptr, partial_ptr, arena_ptr, prefills_ptr, d, layer, splits, max_rank,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`g(p @ W_down + b_down)[k]` of one prompt."""
    prompt = tl.program_id(0)
    k = tl.program_id(1)
    length = tl.load(prefills_ptr + prompt * 4 + 1)
    record, rank = _record(arena_ptr, prefills_ptr, prompt, layer)
    if k < rank:
        words = record.to(tl.pointer_type(tl.int32))
        pooling = tl.load(words + 5)
        shares = tl.where(pooling == 0, 1, splits)
        weights = _part(record, words, 12)
        x = tl.load(_part(record, words, 10).to(tl.pointer_type(tl.float32)) + k)
        for first in range(0, d, BLOCK):
            j = first + tl.arange(0, BLOCK)
            inside = j < d
            partial = partial_ptr + (prompt * splits).to(tl.int64) * d + j
            pooled = tl.load(partial, mask=inside, other=0.0)
            for share in range(1, shares):
                other = tl.load(partial + share * d, mask=inside, other=0.0)
                greater = (other > pooled) | (other != other)
                pooled = tl.where(pooling == 2, tl.where(greater, other, pooled), pooled + other)
            pooled = tl.where(pooling == 1, pooled / length, pooled)
            w = _weights(weights, tl.load(words), k.to(tl.int64) * d + j, inside)
            x += tl.sum(w * pooled, axis=0)
        kind = tl.load(words + 1)
        if kind == 0:
            y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
        elif kind == 1:
            y = tl.where((x > 0.0) | (x != x), x, 0.0)
        else:
            floats = record.to(tl.pointer_type(tl.float32))
            above = _horner(floats + 32, tl.load(words + 3), x)
            below = _horner(floats + 68, tl.load(words + 4) - 1, x)
            y = above / (1.0 + tl.abs(x * below))
        tl.store(latent_ptr + prompt * max_rank + k, y)


@triton.jit(do_not_specialize=["layer", "max_rank"])
def _columns_kernel(
    vectors_ptr, latent_ptr, arena_ptr, prefills_ptr, width, layer, max_rank, BLOCK: tl.constexpr
):
    """A block of one prompt's vectors less 1, into its row of the store."""
    prompt = tl.program_id(0)
    target = tl.load(prefills_ptr + prompt * 4 + 2).to(tl.int64)
    record, rank = _record(arena_ptr, prefills_ptr, prompt, layer)
    words = record.to(tl.pointer_type(tl.int32))
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if rank >= 0:
        source = tl.full((BLOCK,), -1, tl.int32)
        before = 0
        for i in range(tl.load(words + 9)):
            first = tl.load(words + 16 + 2 * i)
            size = tl.load(words + 17 + 2 * i)
            source = tl.where((j >= first) & (j < first + size), j - first + before, source)
            before += size
        named = source >= 0
        dtype = tl.load(words)
        columns = tl.load(words + 8)
        up = _part(record, words, 13)
        made = tl.zeros((BLOCK,), tl.float32)
        for k in range(rank):
            w = _weights(up, dtype, k * columns.to(tl.int64) + source, named)
            made += tl.load(latent_ptr + prompt * max_rank + k) * w
        made += _weights(_part(record, words, 11), dtype, source, named) - 1.0
        total = tl.where(named, made, 0.0)
    at = vectors_ptr + target * width + j
    tl.store(at, total.to(vectors_ptr.dtype.element_ty), mask=j < width)


def generate_vectors(
    hidden: Tensor,
    vectors: Tensor,
    arena: Tensor,
    prefills: Tensor,
    layer: Tensor,
    counts: Tensor,
) -> None:
    """See `vllm_pedro.ops.generate_vectors`."""
    count, max_rank = int(counts[0]), int(counts[2])
    if count == 0:
        return
    d, width, index = hidden.shape[1], vectors.shape[1], int(layer)
    splits = max(1, min(SPLITS, 512 // count))
    block = triton.next_power_of_2(d)
    partial = hidden.new_empty(count, splits, d, dtype=torch.float32)
    latent = hidden.new_empty(count, max(1, max_rank), dtype=torch.float32)
    warps = 16 if block >= 4096 else 4
    if max_rank:
        _pool_kernel[(count, splits)](
            partial, hidden, arena, prefills, hidden.stride(0), d, index, splits,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
        _latent_kernel[(count, max_rank)](
            latent, partial, arena, prefills, d, index, splits, max_rank,
            BLOCK=min(block, 2048), num_warps=4,
        )  # fmt: skip
    _columns_kernel[(count, triton.cdiv(width, BLOCK))](
        vectors, latent, arena, prefills, width, index, max_rank, BLOCK=BLOCK
    )


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
