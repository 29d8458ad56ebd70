"""The rational activation R(x), and its fit to GELU.

Sources:

- PEDRO (arXiv 2409.17834): a rational function with learnable coefficients as the generators'
  activation, one for each layer.
- Molina et al., Padé Activation Units (arXiv 1907.06732): the form with an absolute value in the
  denominator.
- Lawson, Contributions to the theory of linear least maximum approximation (UCLA, 1961), and Rice
  and Usow, The Lawson algorithm and extensions (Math. Comp. 22, 1968): minimax fits by reweighted
  least squares.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

_Array = npt.NDArray[np.float64]

WIDE_FIT_LIMIT = 10.0
"""GELU is fitted on [-limit, limit]. So wide, because without an input norm the activation's inputs
reach tens at initialisation, and outside the interval the fit drifts away."""

NARROW_FIT_LIMIT = 3.0
"""The limit for orders below (5, 4), which cannot follow GELU further; with an input norm the
activation's inputs lie within it."""

GELU_NUMERATOR = (
    0.0,
    0.5,
    0.41498303681214027,
    0.1246228872811452,
    0.016587013074909396,
    0.000941805407456191,
    1.624519198124196e-05,
)
"""a_0 to a_6 of `fit_gelu_rational((6, 5))`, stored so that importing costs no fit; a test repeats
the fit."""

GELU_DENOMINATOR = (0.0, 0.24924577456229002, 0.0, 0.001883610814912383, 0.0)
"""b_1 to b_5 of the same fit."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _horner(x: Tensor, coefficients: Tensor) -> Tensor:
    terms = coefficients.unbind()
    result = terms[-1].expand_as(x)
    for term in reversed(terms[:-1]):
        result = result * x + term
    return result


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """`R(x) = sum_{j=0..m} a_j x^j / (1 + |sum_{i=1..n} b_i x^i|)`, elementwise.

    The denominator is at least 1, so R has no poles. Where the inner sum is 0 its absolute value
    has no derivative and autograd takes 0, which lies between the two one-sided ones.

    Args:
        x: any shape.
        numerator: `[m + 1]`, a_0 first.
        denominator: `[n]`, b_1 first; n >= 1.

    Returns:
        The shape and dtype of `x`.
    """
    return _horner(x, numerator) / (1.0 + (x * _horner(x, denominator)).abs())


@functools.cache
def fit_gelu_rational(
    order: tuple[int, int] = (6, 5),
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coefficients with which `rational` is close to GELU; deterministic.

    A least-squares fit in float64, reweighted by the errors (Lawson) until it is a minimax fit,
    on [-10, 10], or [-3, 3] for orders below (5, 4). It has two constraints: a_0 = 0, so that
    R(0) = GELU(0) = 0, and only even powers in the denominator, so that the inner sum has one
    sign and R no kink. Degrees beyond 10 over 8 stay 0: they would add nothing but
    ill-conditioned terms.

    For the default order the largest error is 4.3e-3 on [-10, 10]. Outside, R grows like
    0.0095 x^2 + x / 2: R(10) = 10.0, R(-10) = 0.0, R(30) = 29.6, R(-30) = -0.4,
    R(100) = 143.8, R(-100) = 43.8.

    Args:
        order: degrees (m, n) of numerator and denominator.

    Returns:
        numerator (m + 1 values, a_0 first) and denominator (n values, b_1 first).
    """
    if order == (6, 5):
        return GELU_NUMERATOR, GELU_DENOMINATOR
    return _fit_gelu(order)


def _fit_gelu(order: tuple[int, int]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    m, n = order
    limit = WIDE_FIT_LIMIT if m >= 5 and n >= 4 else NARROW_FIT_LIMIT
    degrees = range(2, min(n, 8) + 1, 2) if n > 1 else (1,)
    candidates = [_lawson(min(m, degree + 2), degree, limit) for degree in degrees]
    _, top, bottom = min(candidates, key=lambda candidate: candidate[0])
    return (
        tuple(top.tolist()) + (0.0,) * (m + 1 - len(top)),
        tuple(bottom.tolist()) + (0.0,) * (n - len(bottom)),
    )


def _lawson(m: int, n: int, limit: float) -> tuple[float, _Array, _Array]:
    """Minimax fit of GELU on [-limit, limit]: the largest error, a_0..a_m and b_1..b_n."""
    # Chebyshev points, in t = x / limit so that high powers stay comparable.
    t = np.cos(np.pi * (np.arange(401) + 0.5) / 401)
    target = functional.gelu(torch.from_numpy(t * limit)).numpy()
    # n = 1 leaves only the odd power, for which |b_1 x| = b_1 |x|.
    powers = np.arange(2, n + 1, 2) if n > 1 else np.array([1])
    above = t[:, None] ** np.arange(1, m + 1)
    below = np.abs(t[:, None]) ** powers
    weight, scale = np.ones_like(t), np.ones_like(t)
    best = (float("inf"), np.zeros(m + 1), np.zeros(n))
    for _ in range(250):
        # N - f * q = f is linear in the coefficients; dividing by the last denominator turns its
        # residual into that of N / (1 + q) - f.
        root = np.sqrt(weight) / scale
        matrix = np.concatenate([above, -target[:, None] * below], axis=1) * root[:, None]
        solution = np.linalg.lstsq(matrix, target * root, rcond=1e-14)[0]
        # Without a sign change of the inner sum, no kink of its absolute value, here or outside.
        solution[m:] = np.abs(solution[m:])
        scale = 1.0 + below @ solution[m:]
        error = np.abs(above @ solution[:m] / scale - target)
        if error.max() < best[0]:
            a, b = np.zeros(m + 1), np.zeros(n)
            a[1:], b[powers - 1] = solution[:m], solution[m:]
            best = (
                float(error.max()),
                a / limit ** np.arange(m + 1),
                b / limit ** np.arange(1, n + 1),
            )
        weight = weight * np.sqrt(error) + 1e-9 * weight.max()
        weight /= weight.sum()
    return best
