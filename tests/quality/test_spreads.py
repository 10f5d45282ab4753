"""Medians and their intervals, beside what is known of order statistics."""

from __future__ import annotations

import itertools
import math

import pytest

from voidprune.quality.spreads import CONFIDENCE, Spread, interval_confidence, median_spread, ratio_spread


def test_known_ranks_of_the_sign_test() -> None:
    """Conover, table A3: of 15 values the 4th and the 12th, of 10 the 2nd and the 9th, of 6 the range."""
    assert median_spread(range(1, 16)) == Spread(8, 4, 12)
    assert median_spread(range(1, 11)) == Spread(5.5, 2, 9)
    assert median_spread(range(1, 7)) == Spread(3.5, 1, 6)


@pytest.mark.parametrize("num_values", [1, 2, 5])
def test_few_values_give_their_range_and_say_how_little_that_is(num_values: int) -> None:
    assert median_spread(range(num_values)) == Spread((num_values - 1) / 2, 0, num_values - 1)
    assert interval_confidence(num_values) == 1 - 2 ** (1 - num_values) < CONFIDENCE


@pytest.mark.parametrize("num_values", range(6, 16))
def test_the_confidence_is_that_of_all_ways_to_fall(num_values: int) -> None:
    """Every value lies below or above the true median with equal chance; counted over all ways, not summed by a formula."""
    spread = median_spread(range(num_values))
    rank = int(spread.low)
    held = sum(rank < sum(signs) < num_values - rank for signs in itertools.product((False, True), repeat=num_values))
    assert math.isclose(held / 2**num_values, interval_confidence(num_values))
    assert interval_confidence(num_values) >= CONFIDENCE


def test_order_does_not_matter_and_ratios_are_of_one_round() -> None:
    assert median_spread([3.0, 1.0, 2.0]) == median_spread([1.0, 2.0, 3.0])
    assert ratio_spread([2.0, 40.0, 6.0], [1.0, 20.0, 3.0]) == Spread(2.0, 2.0, 2.0)


def test_width_is_a_share() -> None:
    assert Spread(4.0, 3.0, 5.0).width == 0.5
    assert Spread(0.0, 0.0, 0.0).width == 0.0
