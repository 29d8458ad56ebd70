"""How a generator's weights lie in memory, so that one tensor a layer holds all of them.

An operator in a compiled graph then takes one argument for them, and an adapter is copied onto a
device in one piece a layer. `csrc/layout.h` is the same in C++.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HEADER = 8
NUMERATOR = 33
DENOMINATOR = 32
MAX_ORDER = 32
"""Highest degree of a rational activation's polynomials."""

ACTIVATIONS = ("gelu", "relu", "rational")
POOLINGS = ("last", "mean", "max")


@dataclass(frozen=True, slots=True)
class GeneratorLayout:
    """Places of one generator's tensors in a record of float32.

    A record is: header [8] (activation, r, m, n, pooling, input norm, 0, 0), W_down [R, d], W_up
    transposed [R, D], b_up [D], numerator [33], denominator [32], and zeros up to a multiple of 4.

    Attributes:
        hidden_size: d.
        width: D.
        max_rank: R, at least 1.
    """

    hidden_size: int
    width: int
    max_rank: int

    @classmethod
    def of(cls, generators: Tensor, hidden_size: int, width: int) -> GeneratorLayout:
        """The layout of `[slots, record]`, whose rank follows from the record's size."""
        fixed = HEADER + width + NUMERATOR + DENOMINATOR
        return cls(hidden_size, width, (generators.shape[1] - fixed) // (hidden_size + width))

    @property
    def down(self) -> int:
        """Where W_down begins."""
        return HEADER

    @property
    def up(self) -> int:
        """Where W_up begins."""
        return self.down + self.max_rank * self.hidden_size

    @property
    def bias(self) -> int:
        """Where b_up begins."""
        return self.up + self.max_rank * self.width

    @property
    def numerator(self) -> int:
        """Where the numerator's coefficients begin."""
        return self.bias + self.width

    @property
    def denominator(self) -> int:
        """Where the denominator's coefficients begin."""
        return self.numerator + NUMERATOR

    @property
    def record(self) -> int:
        """Floats of one generator; records begin at multiples of 16 bytes."""
        return -(-(self.denominator + DENOMINATOR) // 4) * 4

    def views(self, generators: Tensor) -> GeneratorViews:
        """The parts of `[slots, record]` by name, without a copy."""
        slots, d, width, rank = len(generators), self.hidden_size, self.width, self.max_rank
        return GeneratorViews(
            header=generators[:, :HEADER],
            down=generators[:, self.down : self.up].view(slots, rank, d),
            up=generators[:, self.up : self.bias].view(slots, rank, width).transpose(1, 2),
            bias=generators[:, self.bias : self.numerator],
            numerator=generators[:, self.numerator : self.denominator],
            denominator=generators[:, self.denominator : self.denominator + DENOMINATOR],
        )

    def empty(self, slots: int, device: torch.device) -> Tensor:
        """`[slots, record]` of generators that generate vectors of ones."""
        generators = torch.zeros(slots, self.record, device=device)
        generators[:, self.bias : self.numerator] = 1.0
        return generators


@dataclass(frozen=True, slots=True)
class GeneratorViews:
    """Parts of `[slots, record]`.

    Attributes:
        header: `[slots, 8]`.
        down: `[slots, R, d]`.
        up: `[slots, D, R]`, as adapters have it; not contiguous.
        bias: `[slots, D]`.
        numerator: `[slots, 33]`, of which m + 1 are used.
        denominator: `[slots, 32]`, of which n are used.
    """

    header: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor
    numerator: Tensor
    denominator: Tensor
