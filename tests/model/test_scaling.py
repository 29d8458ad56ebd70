"""Scaling by sequence: the product, its gradients, and what is kept for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_pedro.model.scaling import scale_sequences

SEQUENCES = torch.tensor([[0, 0, 1, 1, 1], [2, 3, 3, 3, 3]])


def make(dtype: torch.dtype, packed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    random = torch.Generator().manual_seed(0)
    output = torch.randn(2, 5, 7, generator=random, dtype=torch.float64).to(dtype)
    rows = 4 if packed else 2
    factor = torch.randn(rows, 7, generator=random, dtype=torch.float64).to(dtype)
    return output, factor, SEQUENCES if packed else None


def plain(output: Tensor, factor: Tensor, sequences: Tensor | None) -> Tensor:
    return output * (factor[:, None] if sequences is None else factor[sequences])


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_are_those_of_finite_differences(packed: bool) -> None:
    output, factor, sequences = make(torch.float64, packed)
    output.requires_grad_()
    factor.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: scale_sequences(a, b, sequences), (output, factor))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_as_plain_multiplication(dtype: torch.dtype, tolerance: float, packed: bool) -> None:
    """Factors of zero, and tiny ones, included."""
    output, factor, sequences = make(dtype, packed)
    factor[0, 0], factor[1, 2], factor[1, 3] = 0.0, 1e-30, -1e-3
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (plain, scale_sequences):
        a, b = output.clone().requires_grad_(), factor.clone().requires_grad_()
        product = function(a, b, sequences)
        (product.float() * weights).sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        results.append((product.detach(), a.grad, b.grad))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_products_are_bit_equal_without_and_with_gradients() -> None:
    output, factor, _ = make(torch.float32, False)
    with torch.no_grad():
        expected = scale_sequences(output, factor)
    assert torch.equal(expected, plain(output, factor, None))
    assert torch.equal(scale_sequences(output, factor.requires_grad_()), expected)


def test_only_the_product_is_kept() -> None:
    """What follows keeps it too, so scaling itself adds the factor alone."""
    output, factor, _ = make(torch.float32, False)
    output.requires_grad_()
    factor.requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    unscaled = output + 1  # a tensor that nothing else holds, as a projection's output is
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        product = scale_sequences(unscaled, factor)
    assert product.data_ptr() in kept
    assert unscaled.data_ptr() not in kept
