"""The vector generator: how a prompt's hidden states become scaling vectors.

This is the only place with the maths of PEDRO (arXiv 2409.17834) and of PARA (arXiv 2502.01033),
its sibling with GELU for g; training and serving both call it. r = 0 leaves b_up alone, which is
(IA)^3 (arXiv 2205.05638). For layer i, with h the residual stream at the layer's input and P the
pooled length:

    p = Pooler(h[0:P]),   l = g(p @ W_down + b_down) @ W_up + b_up,   l_q, l_v, l_u = Split(l)

b_down is an extension, which the paper does not have.

Everything is computed in float32 (float64 for float64 inputs) whatever dtype comes in and
whatever autocast says: the residual stream of real models reaches an RMS of 30 and more, and the
sixth power in the rational activation then leaves the range of 16-bit floats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .backbone import BackboneShape
from .config import PedroConfig
from .errors import PedroError
from .rational import compute_dtype, fit_gelu_rational, rational

RMS_EPS = 1e-6
"""What `rms_normalize` adds to the mean square."""
DOWN_PROJ_STD = 0.02
"""Standard deviation of a fresh W_down."""


def rms_normalize(hidden: Tensor) -> Tensor:
    """`h / sqrt(mean(h^2) + 1e-6)` over the last dimension, without weights.

    Args:
        hidden: `[..., d]`, any float dtype.

    Returns:
        `[..., d]` in float32 (float64 for float64).
    """
    hidden = hidden.to(compute_dtype(hidden))
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
    dtype = compute_dtype(hidden)
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
    dtype = compute_dtype(pooled)
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
    bias: nn.Parameter | None

    def __init__(self, r: int, hidden_size: int, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(r, hidden_size, dtype=torch.float32))
        bias = nn.Parameter(torch.empty(r, dtype=torch.float32)) if has_bias else None
        self.register_parameter("bias", bias)


class _UpProj(nn.Module):
    """W_up, and b_up as `shift` = b_up - 1, which 16 bits can hold and an optimizer can move."""

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        if r > 0:
            self.weight = nn.Parameter(torch.empty(width, r, dtype=torch.float32))
        self.shift = nn.Parameter(torch.empty(width, dtype=torch.float32))

    @property
    def bias(self) -> Tensor:
        """b_up, [D], in float32 (float64 for float64)."""
        return self.shift.to(compute_dtype(self.shift)) + 1.0

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}bias" in state_dict:  # as on disk
            state_dict[f"{prefix}shift"] = state_dict.pop(f"{prefix}bias") - 1.0
        super()._load_from_state_dict(state_dict, prefix, *args)


class _RationalCoefficients(nn.Module):
    def __init__(self, order: tuple[int, int]) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.empty(order[0] + 1, dtype=torch.float32))
        self.denominator = nn.Parameter(torch.empty(order[1], dtype=torch.float32))


class VectorGenerator(nn.Module):
    """One layer's vector generator.

    The names in its `state_dict` are those on disk after `vector_generator.`, but that in place of
    `up_proj.bias` [D], b_up, there is `up_proj.shift` [D], b_up - 1: `down_proj.weight` [r, d],
    with a down bias `down_proj.bias` [r], `up_proj.weight` [D, r], and for the rational activation
    `activation.numerator` [m + 1], `activation.denominator` [n]. With r = 0 there is only
    `up_proj.shift`.

    The parameters do not become narrower than float32: `to`, `half` and `bfloat16` move them and
    leave them as wide as they are, and `train` widens those that others have narrowed.

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
        widths = shape.widths_of(layer_index)
        self.target_modules = tuple(m for m in config.target_modules if widths[m])
        self.split_widths = shape.split_widths(self.target_modules, layer_index)
        self.pooling = config.pooling
        self.input_norm = config.input_norm
        self.order = config.rational_order
        self.kind = config.activation_of(layer_index) if config.r > 0 else "relu"
        self.is_static = config.r == 0
        self.up_proj = _UpProj(sum(self.split_widths), config.r)
        if not self.is_static:
            self.down_proj = _DownProj(config.r, shape.hidden_size, config.down_bias)
            if self.kind == "rational":
                self.activation = _RationalCoefficients(config.rational_order)
        self.reset_parameters(random)

    @torch.no_grad()
    def reset_parameters(self, random: torch.Generator | None = None) -> None:
        """W_down ~ N(0, 0.02^2), b_up = 1, the others 0, g near GELU: the vectors are all ones."""
        self.up_proj.shift.zero_()
        if self.is_static:
            return
        self.down_proj.weight.normal_(0.0, DOWN_PROJ_STD, generator=random)
        if self.down_proj.bias is not None:
            self.down_proj.bias.zero_()
        self.up_proj.weight.zero_()
        if self.kind == "rational":
            numerator, denominator = fit_gelu_rational(self.order)
            self.activation.numerator.copy_(torch.tensor(numerator))
            self.activation.denominator.copy_(torch.tensor(denominator))

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """The parameters by their names on disk, detached; all but b_up share memory.

        Of sharded ones (FSDP2) the whole is gathered, for which every process has to call it.
        """
        found = {name: whole(tensor) for name, tensor in self.state_dict().items()}
        shift = found.pop("up_proj.shift")
        names = list(self.state_dict())
        found["up_proj.bias"] = shift.to(compute_dtype(shift)) + 1.0
        return {n.replace("shift", "bias"): found[n.replace("shift", "bias")] for n in names}

    @torch.no_grad()
    def settle(self) -> None:
        """Round b_up - 1 to what b_up on disk can hold; no vector changes by it.

        A training that goes on does then the same as one that is resumed.
        """
        self.up_proj.shift.copy_(self.up_proj.bias - 1.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorGenerator:
        def wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrows = result.is_floating_point() and result.element_size() < 4
            return tensor.to(result.device) if narrows else result

        super()._apply(wide, recurse)
        return self

    def train(self, mode: bool = True) -> VectorGenerator:
        """As of any module; parameters in 16 bits become float32 before a step is taken."""
        if mode:
            for parameter in self.parameters():
                # TRL narrows them beside a quantised backbone. Sharded ones are left alone.
                data = parameter.data
                if data.element_size() < 4 and type(data) in (Tensor, nn.Parameter):
                    parameter.data = data.float()
        super().train(mode)
        return self

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The vectors of each target module, from the prompt's hidden states.

        Args:
            hidden: `[P, d]` or `[B, P, d]`: the residual stream at the layer's input.
            mask: bool `[P]` or `[B, P]`, True at prompt tokens; see `pool`.

        Returns:
            For each target module that the layer has, in the config's order, `[d_t]` or
            `[B, d_t]` in float32 (float64 if `hidden` is).
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
            None if self.is_static else self.down_proj.bias,
        )
        parts = torch.split(vectors, self.split_widths, dim=-1)
        return dict(zip(self.target_modules, parts, strict=True))


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or what the shards of it in several processes are together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _dims(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
