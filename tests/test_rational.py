"""The rational activation and its fit to GELU."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_pedro import rational as module
from vllm_pedro.rational import fit_gelu_rational, rational


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by threads, and badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def exact_gelu(x: float) -> float:
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


@settings(deadline=None)
@given(
    x=st.floats(-5, 5),
    numerator=st.lists(st.floats(-2, 2), min_size=2, max_size=8),
    denominator=st.lists(st.floats(-2, 2), min_size=1, max_size=7),
)
def test_rational_is_the_formula(
    x: float, numerator: list[float], denominator: list[float]
) -> None:
    top = sum(a * x**j for j, a in enumerate(numerator))
    bottom = 1 + abs(sum(b * x ** (i + 1) for i, b in enumerate(denominator)))
    found = rational(
        torch.tensor(x, dtype=torch.float64),
        torch.tensor(numerator, dtype=torch.float64),
        torch.tensor(denominator, dtype=torch.float64),
    )
    assert found.item() == pytest.approx(top / bottom, rel=1e-9, abs=1e-9)


def test_default_fit() -> None:
    numerator, denominator = fit_gelu_rational()
    assert (len(numerator), len(denominator)) == (7, 5)
    for stored, fitted in zip((numerator, denominator), module._fit_gelu((6, 5)), strict=True):
        assert stored == pytest.approx(fitted, rel=1e-5, abs=1e-9)
    top, bottom = torch.tensor(numerator), torch.tensor(denominator)
    x = torch.linspace(-10, 10, 20001)
    gelu = torch.tensor([exact_gelu(v) for v in x.tolist()])
    error = (rational(x, top, bottom) - gelu).abs().max().item()
    assert 4.1e-3 < error < 4.3e-3  # as the docstring says
    assert rational(torch.zeros(1), top, bottom).item() == 0.0
    outside = rational(torch.tensor([30.0, -30.0, 100.0, -100.0]), top, bottom)
    assert outside.tolist() == pytest.approx([29.65, -0.35, 143.8, 43.8], abs=0.05)


@pytest.mark.parametrize(
    ("order", "limit", "bound"),
    [
        ((5, 4), 10, 7e-3),
        ((8, 8), 10, 4.3e-3),
        ((10, 8), 10, 2e-5),
        ((32, 32), 10, 2e-5),
        ((4, 4), 3, 2e-3),
        ((3, 2), 3, 2e-2),
        ((2, 1), 3, 0.25),
        ((1, 1), 3, 1.6),
        ((1, 5), 3, 1.6),
    ],
)
def test_fits_of_other_orders(order: tuple[int, int], limit: float, bound: float) -> None:
    numerator, denominator = fit_gelu_rational(order)
    assert (len(numerator) - 1, len(denominator)) == order
    assert fit_gelu_rational(order) is fit_gelu_rational(order)
    x = torch.linspace(-limit, limit, 4001)
    found = rational(x, torch.tensor(numerator), torch.tensor(denominator))
    assert (found - torch.nn.functional.gelu(x)).abs().max() < bound


def test_gradients_where_the_denominator_has_its_kink() -> None:
    x = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    numerator = torch.tensor([0.1, 0.5, 0.4], dtype=torch.float64, requires_grad=True)
    denominator = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)  # 0 at 0, 0.5
    result = rational(x, numerator, denominator)
    gradients = torch.autograd.grad(result.sum(), (x, numerator, denominator))
    assert all(bool(g.isfinite().all()) for g in gradients)
