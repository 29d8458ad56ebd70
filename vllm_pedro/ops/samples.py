"""Inputs for the operators: one table for tests, benchmarks and the check on a GPU.

Widths are odd on purpose, and offsets break the alignment that kernels like to assume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import POOLINGS
from .layout import DTYPES as STORED
from .layout import UNIT, BlobLayout, aligned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Error to the float32 result, relative to the larger of it and 1. float32: the order of sums.
# 16 bits: one rounding (half a unit in the last place: 2^-9 and 2^-12), and as much again where a
# sum in another order falls to the other side of it.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# Which row each token reads, on a store of 4; 0 is the identity.
BATCHES: dict[str, list[int]] = {
    "empty": [],
    "one base row": [0],
    "one row": [2],
    "no row has an adapter": [0] * 9,
    "all rows": [1, 2, 3, 1, 2, 3, 1, 2, 3],
    "some rows": [0, 3, 0, 0, 1, 0, 2, 2, 0],
    "prompts": [0] * 3 + [1] * 37 + [2] * 20 + [0] * 5,
}

# Query, key and value widths, then FFN width. The second and third fit no vector width; of the last
# the FFN's does, but not its place in the store.
WIDTHS = (
    (64, 32, 32, 96),
    (5, 3, 3, 7),
    (72, 24, 24, 130),
    (576, 192, 192, 1536),
    (5, 3, 3, 16),
)


@dataclass(frozen=True, slots=True)
class ScaleSample:
    """Inputs of `scale_columns_`."""

    x: Tensor
    vectors: Tensor
    token_rows: Tensor
    counts: Tensor
    ranges: dict[str, tuple[int, ...]]


def scale_sample(
    batch: str, widths: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> ScaleSample:
    """Inputs with all five modules in the store; `ranges` names subsets of Q, K and V."""
    q, k, v, f = widths
    random = torch.Generator().manual_seed(sum(widths))
    rows = torch.tensor(BATCHES[batch], dtype=torch.int64)
    tokens = len(rows)
    vectors = torch.rand(4, q + k + v + 2 * f, generator=random).sub(0.5).to(dtype)
    vectors[0] = 0.0
    ranges = {
        "q, v": (0, 0, q, q + k, q + k, v),
        "all": (0, 0, q + k + v),
        "k": (q, q, k),
        # More than a kernel takes at once.
        "four pieces": (0, 0, 1, 1, 1, q - 1, q, q, k, q + k, q + k, v),
        "none": (),
    }
    return ScaleSample(
        torch.randn(tokens, q + k + v, generator=random).to(dtype).to(device),
        vectors.to(device),
        torch.cat((rows, torch.zeros(3, dtype=torch.int64))).to(device),
        torch.tensor([0, int((rows != 0).sum()), 0], dtype=torch.int32),
        ranges,
    )


@dataclass(frozen=True, slots=True)
class GenerateSample:
    """Inputs of `generate_vectors`.

    Attributes:
        record_bytes: What one prompt's record takes at most.
    """

    hidden: Tensor
    vectors: Tensor
    arena: Tensor
    prefills: Tensor
    layer: Tensor
    counts: Tensor
    record_bytes: int

    def args(self) -> tuple[Tensor, ...]:
        """In the operator's order."""
        return self.hidden, self.vectors, self.arena, self.prefills, self.layer, self.counts


# d, D, largest rank.
SIZES = ((64, 160, 8), (37, 51, 5), (8, 600, 1))

LENGTHS = (5, 1, 140, 3, 2, 9, 4)
"""Tokens of one prompt for each of a sample's adapters."""

LAYER = 1


def generate_sample(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    lengths: tuple[int, ...] = LENGTHS,
    device: torch.device | str = "cpu",
) -> GenerateSample:
    """One prompt for each of seven adapters: every pooling, activation, input norm and dtype.

    Two are static, four have a part of the store's columns, some a down bias, and the last has no
    generator in the layer. A base row of 4 tokens stands before the prompts;
    the rows of the store that they write hold 7, the others 0.
    """
    d, width, max_rank = size
    random = torch.Generator().manual_seed(d)
    blobs, places, end = [], [], 3 * 256
    for slot in range(7):
        rank = (max_rank, 1, 0, max_rank, max_rank, 0, 1)[slot]
        third = width // 3
        ranges = ([(0, width)], [(1, third), (2 * third, width - 2 * third - 1)])[slot % 2]
        ranges = [(third, 7)] if slot == 4 else ranges
        layout = BlobLayout((tuple(ranges),) * 2, d, rank, STORED[(0, 1, 1, 2, 1, 2, 0)[slot]])
        kind = ("rational", "relu", "gelu", "rational", "gelu", "relu", "gelu")[slot]
        order = (6, 5) if slot == 0 else (3, 2)
        blob = np.full(layout.nbytes, 0xFF, np.uint8)
        layout.begin(
            blob,
            [kind] * 2,
            order,
            POOLINGS[(slot // 2) % 3],
            slot % 2 == 1,
        )
        views = layout.views(blob, slice(0, 2))
        for values, scale in (
            (views.down, d**-0.5),
            (views.up, 0.3),
            (views.bias, 1.0),
            (views.down_bias, 0.5 if slot % 2 else 0.0),
            (views.numerator[:, : order[0] + 1], 0.2),
            (views.denominator[:, : order[1]], 0.2),
        ):
            drawn = torch.randn(values.shape, generator=random) * scale
            if values.dtype == np.uint16:
                values[...] = drawn.to(torch.bfloat16).view(torch.uint16).numpy()
            else:
                values[...] = drawn.numpy()
        if slot == 6:
            blob[: layout.first_record].view(np.int32)[8 + LAYER] = 0
        places.append(end // UNIT)
        blobs.append(blob)
        end = aligned(end + layout.nbytes, 256)
    arena = np.full(end, 0xFF, np.uint8)
    for place, blob in zip(places, blobs, strict=True):
        arena[place * UNIT : place * UNIT + len(blob)] = blob
    prompts, start = [], 4
    for i, length in enumerate(lengths):
        prompts.append((start, length, i + 1, places[i % 7]))
        start += length
    prompts.sort(key=lambda p: p[3])
    table = torch.zeros(len(lengths) + 2, 4, dtype=torch.int32)
    if prompts:
        table[: len(prompts)] = torch.tensor(prompts, dtype=torch.int32)
    vectors = torch.full((len(lengths) + 2, width), 7.0, dtype=dtype)
    vectors[[0, -1]] = 0.0
    largest = BlobLayout((((0, width),),), d, max_rank, "float32")
    return GenerateSample(
        torch.randn(start + 2, d, generator=random).to(dtype).to(device),
        vectors.to(device),
        torch.from_numpy(arena).to(device),
        table.to(device),
        torch.tensor([LAYER], dtype=torch.int32),
        torch.tensor([len(prompts), len(prompts), max_rank], dtype=torch.int32),
        largest.nbytes - largest.first_record,
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the larger of the wanted value and 1."""
    if not got.numel():
        return 0.0
    got, want = got.float().cpu(), want.float().cpu()
    return float(((got - want).abs() / want.abs().clamp(min=1.0)).max())


def check(implementation: Any, device: torch.device | str = "cpu", widths: Any = WIDTHS) -> int:
    """Compare an implementation with the reference over the whole table.

    Args:
        implementation: Has the operators as attributes.
        device: Where to run it.
        widths: Which of `WIDTHS`; Triton's interpreter takes minutes for the largest.

    Returns:
        How many cases were compared.

    Raises:
        AssertionError: Names the operator and the case.
    """
    from . import reference

    count = 0
    for batch in BATCHES:
        for each in widths:
            for dtype in DTYPES:
                s = scale_sample(batch, each, dtype, device)
                case = f"{batch}, widths {each}, {dtype}"
                for name, ranges in s.ranges.items():
                    want, got = s.x.clone(), s.x.clone()
                    reference.scale_columns_(want, s.vectors, s.token_rows, ranges, s.counts)
                    implementation.scale_columns_(
                        got, s.vectors, s.token_rows, list(ranges), s.counts
                    )
                    # One operation after the other, so bit for bit.
                    assert torch.equal(got, want), f"scale_columns_: {name}, {case}"
                    count += 1
    for size in SIZES:
        for dtype in DTYPES:
            for lengths in (LENGTHS, (1,), ()):
                g = generate_sample(size, dtype, lengths, device)
                case = f"d, D, R = {size}, lengths {lengths}, {dtype}"
                exact_store = g.vectors.float()
                reference.generate_vectors(g.hidden.float(), exact_store, *g.args()[2:])
                implementation.generate_vectors(*g.args())
                error = relative_error(g.vectors, exact_store)
                assert error <= TOLERANCES[dtype], f"generate_vectors: {error:.1e}, {case}"
                untouched = g.vectors[[0, -1]]
                assert not untouched.any(), f"generate_vectors: other rows, {case}"
                count += 1
    return count
