"""The benchmarks' arithmetic: synthetic timings in, known measures and ratios out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pedro.bench.driver import Timing
from vllm_pedro.bench.figures import (
    Spread,
    break_even,
    fairness,
    measure,
    paired_ratios,
    per_tenant,
)


def test_measures_of_known_times() -> None:
    timings = [
        Timing(0, sent=2.0, tokens=[2.5, 2.6, 2.8]),
        Timing(1, sent=3.0, tokens=[4.0, 4.1, 4.4]),
    ]
    assert measure(timings) == pytest.approx(
        {
            "seconds": 2.4,
            "output_tokens_per_s": 6 / 2.4,
            "latency_mean_ms": (800 + 1400) / 2,
            "ttft_mean_ms": 750,
            "ttft_median_ms": 750,
            "ttft_p99_ms": 500 + 0.99 * 500,
            "itl_mean_ms": (100 + 200 + 100 + 300) / 4,
            "itl_median_ms": 150,
            "itl_p99_ms": 200 + 0.97 * 100,
        }
    )


def test_one_token_answers_have_no_inter_token_latency() -> None:
    found = measure([Timing(None, 0.0, [0.5])])
    assert found["output_tokens_per_s"] == pytest.approx(2)
    assert not any(name.startswith("itl") for name in found)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.29])
def test_a_known_speed_up_survives_a_drifting_machine(factor: float) -> None:
    """Base slows down tenfold over the repeats; the ratio does not notice."""
    base = {i: 100 / (1 + i) for i in range(10)}
    mine = {i: factor * value for i, value in base.items()}
    ratio = paired_ratios(mine, base)
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((factor,) * 3)


def test_ratios_use_the_repeats_that_both_have() -> None:
    ratio = paired_ratios({0: 1.0, 1: 4.0, 2: 9.0}, {1: 2.0, 2: 3.0, 3: 5.0})
    assert ratio == Spread(2.5, 2.0, 3.0)
    assert paired_ratios({0: 1.0}, {1: 1.0}) is None
    assert paired_ratios({}, {}) is None


def test_a_ratio_of_medians_would_be_another_figure() -> None:
    """Paired, PEDRO is always faster; the medians say the opposite."""
    base, mine = {0: 10.0, 1: 20.0, 2: 30.0}, {0: 11.0, 1: 33.0, 2: 31.0}
    ratio = paired_ratios(mine, base)
    assert ratio is not None
    assert ratio.median == pytest.approx(1.1)
    assert Spread.of(mine.values()).median / Spread.of(base.values()).median > 1.5


def test_spread() -> None:
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3)
    assert Spread.of([3, 1, 2]).format(1) == "2.0 (1.0-3.0)"


# Break-even


@pytest.mark.parametrize(
    ("mine", "other", "expected"),
    [
        ((100, 10), (100, 20), 2),  # level at one token, ahead at two
        ((99, 10), (100, 20), 1),  # always ahead
        ((150, 10), (100, 20), 7),  # 5 steps to catch up, the 6th is ahead
        ((155, 10), (100, 20), 7),
        ((100, 20), (100, 20), None),  # never ahead
        ((99, 20), (100, 20), 1),
        ((101, 20), (100, 20), None),
        ((50, 21), (100, 20), None),  # ahead for short answers only
    ],
)
def test_break_even(
    mine: tuple[float, float], other: tuple[float, float], expected: int | None
) -> None:
    assert break_even(mine, other) == expected


# Tenants


def test_per_tenant() -> None:
    timings = [
        Timing(0, 0.0, [1.0, 2.0]),
        Timing(0, 0.0, [3.0, 4.0]),
        Timing(None, 0.0, [0.5]),
    ]
    found = per_tenant(timings)
    assert found[0] == pytest.approx(
        {
            "requests": 2,
            "ttft_mean_ms": 2000,
            "itl_mean_ms": 1000,
            "tokens_per_s": (2 / 2 + 2 / 4) / 2,
        }
    )
    assert found[None] == pytest.approx({"requests": 1, "ttft_mean_ms": 500, "tokens_per_s": 2})


def test_fairness() -> None:
    even = {t: {"tokens_per_s": 5.0, "ttft_mean_ms": 10.0, "itl_mean_ms": 2.0} for t in range(4)}
    assert fairness(even) == pytest.approx(
        {"jain_tokens_per_s": 1, "worst_over_best_ttft": 1, "worst_over_best_itl": 1}
    )
    even[3] = {"tokens_per_s": 5.0, "ttft_mean_ms": 40.0}
    assert fairness(even)["worst_over_best_ttft"] == pytest.approx(4)


@given(st.integers(1, 50), st.floats(1e-3, 1e6))
def test_jains_index_where_one_gets_all(count: int, value: float) -> None:
    for speeds, index in (([value] + [0.0] * (count - 1), 1 / count), ([value] * count, 1)):
        tenants = dict(enumerate({"tokens_per_s": speed} for speed in speeds))
        assert fairness(tenants) == pytest.approx({"jain_tokens_per_s": index})
