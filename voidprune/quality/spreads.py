"""What a figure that is measured again and again comes to: its median, and an interval for it. Nothing is measured here.

Times are never normally distributed: a machine is slowed down, never sped up. So nothing is assumed of how they fall: the
interval is the one between two of the sorted values that holds the median of the distribution with at least 95 % confidence,
whatever that distribution is (Conover, Practical Nonparametric Statistics, 1999, section 3.2). With fewer than 6 values no two
of them do that; then the interval is the range of all, whose confidence is `1 - 2^(1 - n)`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds of a run: its median, and the bounds of an interval for the median."""

    median: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Of the interval, as a share of the median; 0 where that is 0."""
        return (self.high - self.low) / self.median if self.median else 0.0


def median_spread(values: Sequence[float]) -> Spread:
    """The median of one or more values, with its interval."""
    ordered = sorted(values)
    rank = _lower_rank(len(ordered))
    return Spread(statistics.median(ordered), ordered[rank], ordered[-1 - rank])


def ratio_spread(numerators: Iterable[float], denominators: Iterable[float]) -> Spread:
    """Of the ratios of figures of the same round."""
    return median_spread([one / other for one, other in zip(numerators, denominators, strict=True)])


def interval_confidence(num_values: int) -> float:
    """How sure the interval of `median_spread` is: the chance that it holds the median of what the values are drawn from."""
    rank = _lower_rank(num_values)
    return 1 - 2.0 * sum(math.comb(num_values, below) for below in range(rank + 1)) / float(2**num_values)


def _lower_rank(num_values: int) -> int:
    """The largest number of values that may be left out at either end; 0 where leaving out none is not enough either."""
    tail, rank = 0.0, -1
    while rank + 1 < num_values:
        tail += math.comb(num_values, rank + 1) / 2**num_values
        if 2 * tail > 1 - CONFIDENCE:
            break
        rank += 1
    return max(rank, 0)
