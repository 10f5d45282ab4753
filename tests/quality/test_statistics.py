"""Intervals and tests against published values, and against what must hold of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidprune.quality.statistics import (
    Estimate,
    estimate_mean,
    estimate_ratio,
    estimate_share,
    estimate_share_difference,
    exponential,
    mcnemar_p_value,
    wilson_interval,
)


def test_wilson_interval() -> None:
    """Against the value of R's prop.test(81, 263, correct = FALSE), as in Newcombe (1998)."""
    low, high = wilson_interval(81, 263)
    assert (low, high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert estimate_share(81, 263) == Estimate(81 / 263, low, high)


def test_bootstrap_of_a_mean_is_as_wide_as_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = estimate_mean(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert found == estimate_mean(values), "the same every time"


def test_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples of 60 items, 95 % of intervals hold the true mean; fewer than 180 would be a chance of about 1 in 300."""
    random = np.random.default_rng(2)
    found = [estimate_mean(random.exponential(1.0, 60)) for _ in range(200)]
    assert 180 <= sum(one.low <= 1.0 <= one.high for one in found) <= 200


def test_a_ratio_weighs_items_by_their_denominators() -> None:
    found = estimate_ratio(np.array([10.0, 0.0]), np.array([1.0, 4.0]))
    assert (found.value, found.low, found.high) == (2.0, 0.0, 10.0)


def test_one_item_has_an_interval_without_width() -> None:
    assert estimate_mean(np.array([2.5])) == Estimate(2.5, 2.5, 2.5)


def test_exponential_of_what_no_float_holds() -> None:
    assert exponential(Estimate(0.0, -1.0, 1000.0)) == Estimate(1.0, math.exp(-1), math.inf)


def test_mcnemar_against_the_binomial_test() -> None:
    """R: binom.test(1, 8)$p.value is 0.0703125 (the airway data of Fagerland, Lydersen and Laake 2013); binom.test(2, 20)."""
    assert mcnemar_p_value(1, 7) == mcnemar_p_value(7, 1) == 0.0703125
    assert mcnemar_p_value(2, 18) == pytest.approx(0.0004024506, rel=1e-6)
    assert mcnemar_p_value(0, 0) == mcnemar_p_value(5, 5) == 1.0
    assert mcnemar_p_value(0, 3000) == 0.0
    assert 0 < mcnemar_p_value(1900, 2100) < 0.01


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 100))
def test_paired_difference(lost: int, won: int, same: int) -> None:
    num_items = max(1, lost + won + same)
    found = estimate_share_difference(lost, won, num_items)
    assert found.value == (won - lost) / num_items
    assert -1 <= found.low < found.high <= 1
    assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    mirrored = estimate_share_difference(won, lost, num_items)
    assert (mirrored.low, mirrored.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_no_difference_on_few_items_is_no_proof() -> None:
    few, many = estimate_share_difference(0, 0, 10), estimate_share_difference(0, 0, 1000)
    assert few.low < -0.2
    assert -0.005 < many.low < 0


def test_paired_difference_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    kinds = random.multinomial(80, [0.06, 0.02, 0.92], size=500)
    found = [estimate_share_difference(int(lost), int(won), 80) for lost, won, _ in kinds]
    assert 0.92 <= np.mean([one.low <= -0.04 <= one.high for one in found]) <= 0.99
