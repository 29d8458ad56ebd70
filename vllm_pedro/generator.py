"""The vector generator: how a prompt's hidden states become scaling vectors.

This is the only place with the maths of PEDRO (arXiv 2409.17834); training and serving both call
it. For layer i, with h the residual stream at the layer's input and P the pooled length:

    p = Pooler(h[0:P]),   l = g(p @ W_down) @ W_up + b_up,   l_q, l_v, l_u = Split(l)

Everything is computed in float32 (float64 for float64 inputs) whatever dtype comes in and
whatever autocast says: the residual stream of real models reaches an RMS of 30 and more, and the
sixth power in the rational activation then leaves the range of 16-bit floats.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from vllm_pedro.config import BackboneShape, PedroConfig
from vllm_pedro.errors import PedroError

_Array = npt.NDArray[np.float64]

RMS_EPS = 1e-6
DOWN_PROJ_STD = 0.02

# GELU is fitted on [-limit, limit]. So wide, because without an input norm the activations' inputs
# reach tens at initialisation, and outside the interval a fit drifts away. Orders below (5, 4)
# cannot follow GELU that far, and are fitted where inputs lie with an input norm.
WIDE_FIT_LIMIT = 10.0
NARROW_FIT_LIMIT = 3.0

# fit_gelu_rational((6, 5)), kept here so that importing costs no fit; a test fits again.
GELU_NUMERATOR = (
    0.0,
    0.5,
    0.41498303681214027,
    0.1246228872811452,
    0.016587013074909396,
    0.000941805407456191,
    1.624519198124196e-05,
)
GELU_DENOMINATOR = (0.0, 0.24924577456229002, 0.0, 0.001883610814912383, 0.0)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rms_normalize(hidden: Tensor) -> Tensor:
    """`h / sqrt(mean(h^2) + 1e-6)` over the last dimension, without weights.

    Args:
        hidden: `[..., d]`, any float dtype.

    Returns:
        `[..., d]` in float32 (float64 for float64).
    """
    hidden = hidden.to(_compute_dtype(hidden))
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + RMS_EPS)


def pool(hidden: Tensor, pooling: str, mask: Tensor | None = None) -> Tensor:
    """Reduce a prompt's hidden states to one vector.

    Args:
        hidden: one sequence `[P, d]`, or a batch `[B, P, d]`; any float dtype.
        pooling: "last", "mean" or "max".
        mask: bool `[P]` or `[B, P]`, True at the tokens that form the prompt; padding may be on
            either side. None means all of them. A row without a prompt token pools to zeros.

    Returns:
        `[d]` or `[B, d]` in float32 (float64 for float64).
    """
    if hidden.dim() not in (2, 3):
        raise PedroError(f"hidden states: expected [P, d] or [B, P, d], found {_dims(hidden)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != hidden.shape[:-1]):
        raise PedroError(
            f"prompt mask: expected bool {list(hidden.shape[:-1])}, "
            f"found {mask.dtype} {_dims(mask)}"
        )
    dtype = _compute_dtype(hidden)
    if pooling == "last":
        if mask is None:
            return hidden[..., -1, :].to(dtype)
        positions = torch.arange(mask.shape[-1], device=mask.device)
        last = torch.where(mask, positions, -1).amax(dim=-1)
        index = last.clamp(min=0)[..., None, None].expand(*last.shape, 1, hidden.shape[-1])
        chosen = hidden.gather(-2, index).squeeze(-2).to(dtype)
        return chosen.masked_fill((last < 0)[..., None], 0.0)
    hidden = hidden.to(dtype)
    if pooling == "mean":
        if mask is None:
            return hidden.mean(dim=-2)
        # masked_fill rather than a product with the mask: padding may hold NaN.
        total = hidden.masked_fill(~mask[..., None], 0.0).sum(dim=-2)
        return total / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    if pooling == "max":
        if mask is None:
            return hidden.amax(dim=-2)
        highest = hidden.masked_fill(~mask[..., None], -torch.inf).amax(dim=-2)
        return highest.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    raise PedroError(f"unknown pooling {pooling!r}")


def pool_prompt(
    hidden: Tensor, pooling: str, input_norm: str | None, mask: Tensor | None = None
) -> Tensor:
    """`pool` with the input norm, if any, applied to every token before; same shapes."""
    if input_norm is None:
        return pool(hidden, pooling, mask)
    if input_norm != "rms":
        raise PedroError(f"unknown input norm {input_norm!r}")
    if pooling == "last":
        # The norm is per token, so it need not be computed for the tokens that are not used.
        return rms_normalize(pool(hidden, pooling, mask))
    return pool(rms_normalize(hidden), pooling, mask)


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
    """
    return _horner(x, numerator) / (1.0 + (x * _horner(x, denominator)).abs())


def activate(
    x: Tensor, kind: str, numerator: Tensor | None = None, denominator: Tensor | None = None
) -> Tensor:
    """Apply the activation `kind`: "rational" (with its coefficients), "gelu" (erf) or "relu"."""
    if kind == "gelu":
        return functional.gelu(x, approximate="none")
    if kind == "relu":
        return functional.relu(x)
    if kind == "rational":
        if numerator is None or denominator is None:
            raise PedroError("the rational activation needs its coefficients")
        return rational(x, numerator, denominator)
    raise PedroError(f"unknown activation {kind!r}")


@functools.cache
def fit_gelu_rational(
    order: tuple[int, int] = (6, 5),
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coefficients with which `rational` is close to GELU; deterministic.

    A least-squares fit in float64, reweighted by the errors (Lawson) until it is a minimax fit,
    on [-10, 10], or [-3, 3] for orders below (5, 4). Two constraints keep it sane: a_0 = 0, so
    that R(0) = GELU(0) = 0, and only even powers in the denominator, so that the inner sum has
    one sign, and R no kink. Degrees beyond 10 over 8 stay 0: they would add nothing but
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


def generate_vectors(
    pooled: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor,
    kind: str = "gelu",
    numerator: Tensor | None = None,
    denominator: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """`l = g(p @ W_down + b_down) @ W_up + b_up`, not yet split.

    Args:
        pooled: `[d]` or `[B, d]`.
        down: W_down as torch stores it, `[r, d]`; None for static vectors (r = 0).
        up: W_up as torch stores it, `[D, r]`; None for static vectors.
        bias: b_up, `[D]`.
        kind: the activation g.
        numerator: `[m + 1]`, for the rational activation only.
        denominator: `[n]`, for the rational activation only.
        down_bias: b_down, `[r]`; None for none.

    Returns:
        `[D]` or `[B, D]`, float32 (float64 if `pooled` is), on the device of `pooled`.
    """
    dtype = _compute_dtype(pooled)
    bias = bias.to(dtype)
    if down is None or up is None:
        return bias.expand(*pooled.shape[:-1], -1)
    with torch.autocast(device_type=pooled.device.type, enabled=False):
        x = functional.linear(
            pooled.to(dtype), down.to(dtype), None if down_bias is None else down_bias.to(dtype)
        )
        if numerator is not None and denominator is not None:
            numerator, denominator = numerator.to(dtype), denominator.to(dtype)
        x = activate(x, kind, numerator, denominator)
        return functional.linear(x, up.to(dtype), bias)


class _DownProj(nn.Module):
    def __init__(self, r: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(r, hidden_size, dtype=torch.float32))


class _UpProj(nn.Module):
    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        if r > 0:
            self.weight = nn.Parameter(torch.empty(width, r, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(width, dtype=torch.float32))


class _RationalCoefficients(nn.Module):
    def __init__(self, order: tuple[int, int]) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.empty(order[0] + 1, dtype=torch.float32))
        self.denominator = nn.Parameter(torch.empty(order[1], dtype=torch.float32))


class VectorGenerator(nn.Module):
    """One layer's vector generator.

    The names in its `state_dict` are those on disk after `vector_generator.`:
    `down_proj.weight` [r, d], `up_proj.weight` [D, r], `up_proj.bias` [D], and for the rational
    activation `activation.numerator` [m + 1], `activation.denominator` [n]. With r = 0 there is
    only `up_proj.bias`.

    Args:
        config: the adapter's config.
        shape: the backbone's widths.
        layer_index: the layer, which picks the activation if the config lists one a layer.
        random: source of the initial W_down; None for torch's global one.
    """

    def __init__(
        self,
        config: PedroConfig,
        shape: BackboneShape,
        layer_index: int,
        random: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.target_modules = tuple(config.target_modules)
        self.split_widths = shape.split_widths(config.target_modules)
        self.pooling = config.pooling
        self.input_norm = config.input_norm
        self.order = config.rational_order
        self.kind = config.activation_of(layer_index) if config.r > 0 else "relu"
        self.is_static = config.r == 0
        self.up_proj = _UpProj(sum(self.split_widths), config.r)
        if not self.is_static:
            self.down_proj = _DownProj(config.r, shape.hidden_size)
            if self.kind == "rational":
                self.activation = _RationalCoefficients(config.rational_order)
        self.reset_parameters(random)

    @torch.no_grad()
    def reset_parameters(self, random: torch.Generator | None = None) -> None:
        """W_down ~ N(0, 0.02^2), W_up = 0, b_up = 1, g close to GELU: the vectors are all ones."""
        self.up_proj.bias.fill_(1.0)
        if self.is_static:
            return
        self.down_proj.weight.normal_(0.0, DOWN_PROJ_STD, generator=random)
        self.up_proj.weight.zero_()
        if self.kind == "rational":
            numerator, denominator = fit_gelu_rational(self.order)
            self.activation.numerator.copy_(torch.tensor(numerator))
            self.activation.denominator.copy_(torch.tensor(denominator))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The vectors of each target module, from the prompt's hidden states.

        Args:
            hidden: `[P, d]` or `[B, P, d]`: the residual stream at the layer's input.
            mask: bool `[P]` or `[B, P]`, True at prompt tokens; see `pool`.

        Returns:
            For each target module, in the config's order, `[d_t]` or `[B, d_t]` in float32
            (float64 if `hidden` is).
        """
        if self.is_static:
            # No input is looked at; the pooled vector only carries the batch dimension.
            pooled = hidden[..., 0, :]
        else:
            pooled = pool_prompt(hidden, self.pooling, self.input_norm, mask)
        is_rational = self.kind == "rational"
        vectors = generate_vectors(
            pooled,
            None if self.is_static else self.down_proj.weight,
            None if self.is_static else self.up_proj.weight,
            self.up_proj.bias,
            self.kind,
            self.activation.numerator if is_rational else None,
            self.activation.denominator if is_rational else None,
        )
        parts = torch.split(vectors, self.split_widths, dim=-1)
        return dict(zip(self.target_modules, parts, strict=True))


def _dims(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
