"""Inputs for the operators: one table for tests, benchmarks and the check on a GPU.

Widths are odd on purpose, and offsets break the alignment that kernels like to assume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layout import GeneratorLayout

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
    vectors = torch.rand(4, q + k + v + 2 * f, generator=random).add(0.5).to(dtype)
    vectors[0] = 1.0
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
        torch.tensor([0, int((rows != 0).sum())], dtype=torch.int32),
        ranges,
    )


@dataclass(frozen=True, slots=True)
class GenerateSample:
    """Inputs of `generate_vectors`."""

    hidden: Tensor
    vectors: Tensor
    generators: Tensor
    prefills: Tensor
    counts: Tensor

    def args(self) -> tuple[Tensor, ...]:
        """In the operator's order."""
        return self.hidden, self.vectors, self.generators, self.prefills, self.counts


# d, D, largest rank.
SIZES = ((64, 160, 8), (37, 51, 5), (8, 600, 1))


def generate_sample(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    lengths: tuple[int, ...] = (5, 1, 140, 3, 2, 9),
    device: torch.device | str = "cpu",
) -> GenerateSample:
    """One prompt for each of six adapters, of which two are static and every pooling, activation
    and input norm occurs; a base row of 4 tokens stands before the prompts."""
    d, width, max_rank = size
    layout = GeneratorLayout(d, width, max_rank)
    random = torch.Generator().manual_seed(d)
    slots = 6
    generators = layout.empty(slots, torch.device("cpu"))
    views = layout.views(generators)
    for slot in range(slots):
        rank = (max_rank, 1, 0, max_rank, max_rank, 0)[slot]
        m, n = ((6, 5), (1, 1), (3, 2))[slot % 3]
        header = (slot % 3, rank, m, n, (slot // 2) % 3, slot % 2)
        views.header[slot, :6] = torch.tensor(header, dtype=torch.float32)
        views.down[slot, :rank] = torch.randn(rank, d, generator=random) * d**-0.5
        views.up[slot, :, :rank] = torch.randn(width, rank, generator=random) * 0.3
        views.bias[slot] = torch.randn(width, generator=random)
        views.numerator[slot, : m + 1] = torch.randn(m + 1, generator=random) * 0.2
        views.denominator[slot, :n] = torch.randn(n, generator=random) * 0.2
    # Every pooling with every activation over the samples' lengths.
    prompts, start = [], 4
    for i, length in enumerate(lengths):
        prompts.append((start, length, i + 1, i % slots))
        start += length
    prompts.sort(key=lambda p: p[3])
    table = torch.zeros(len(lengths) + 2, 4, dtype=torch.int32)
    if prompts:
        table[: len(prompts)] = torch.tensor(prompts, dtype=torch.int32)
    return GenerateSample(
        torch.randn(start + 2, d, generator=random).to(dtype).to(device),
        torch.ones(len(lengths) + 2, width, dtype=dtype, device=device),
        generators.to(device),
        table.to(device),
        torch.tensor([len(prompts), len(prompts)], dtype=torch.int32),
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
                    # A single multiplication, so bit for bit.
                    assert torch.equal(got, want), f"scale_columns_: {name}, {case}"
                    count += 1
    for size in SIZES:
        for dtype in DTYPES:
            for lengths in ((5, 1, 140, 3, 2, 9), (1,), ()):
                g = generate_sample(size, dtype, lengths, device)
                case = f"d, D, R = {size}, lengths {lengths}, {dtype}"
                exact_store = g.vectors.float()
                reference.generate_vectors(
                    g.hidden.float(), exact_store, g.generators, g.prefills, g.counts
                )
                implementation.generate_vectors(*g.args())
                error = relative_error(g.vectors, exact_store)
                assert error <= TOLERANCES[dtype], f"generate_vectors: {error:.1e}, {case}"
                untouched = g.vectors[[0, -1]]
                assert bool((untouched == 1).all()), f"generate_vectors: other rows, {case}"
                count += 1
    return count
