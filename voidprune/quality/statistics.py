"""How sure a figure is: 95 % intervals of shares, means and ratios, and the test of paired right-or-wrong answers.

Items are what is resampled, never tokens: the tokens of one response depend on each other. What is compared between two runners is
paired: both saw the same items, so the differences of single items are resampled. Everything is deterministic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

CONFIDENCE = 0.95
Z = 1.959964
"""Quantile of the normal distribution for CONFIDENCE, two-sided."""
NUM_RESAMPLES = 2000
SEED = 0


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval. `low <= high`; the figure itself is nearly always between them."""

    value: float
    low: float
    high: float

    def to_document(self) -> dict[str, Any]:
        return {"value": self.value, "interval": [self.low, self.high]}


def wilson_interval(num_right: int, num_items: int) -> tuple[float, float]:
    """Wilson score interval of a share at 95 % (Wilson 1927; Newcombe 1998, method 3). `num_items` is at least one."""
    z, n, p = Z, num_items, num_right / num_items
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def estimate_share(num_right: int, num_items: int) -> Estimate:
    return Estimate(num_right / num_items, *wilson_interval(num_right, num_items))


def estimate_mean(values: FloatArray) -> Estimate:
    """Mean of one figure an item, [N] with N > 0, with a percentile bootstrap interval over the items."""
    return estimate_ratio(values, np.ones(len(values)))


def estimate_ratio(numerators: FloatArray, denominators: FloatArray) -> Estimate:
    """Sum of numerators / sum of denominators, both [N], one an item, with a percentile bootstrap interval over the items.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. With one item the interval has no width.
    """
    sums = _resampled_sums(np.stack([numerators, denominators], axis=1).astype(np.float64))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(sums[:, 0] / sums[:, 1], [tail, 100 - tail])
    return Estimate(float(np.sum(numerators) / np.sum(denominators)), float(low), float(high))


def _resampled_sums(values_NK: FloatArray) -> FloatArray:
    """Sums over NUM_RESAMPLES draws of N items with replacement, [R, K]. Memory is bounded whatever N is."""
    num_items = len(values_NK)
    random = np.random.default_rng(SEED)
    rows = max(1, min(NUM_RESAMPLES, 4_000_000 // num_items))
    pieces = []
    for start in range(0, NUM_RESAMPLES, rows):
        drawn = random.integers(0, num_items, (min(rows, NUM_RESAMPLES - start), num_items), dtype=np.int32)
        pieces.append(np.stack([column[drawn].sum(axis=1) for column in values_NK.T], axis=1))
    return np.concatenate(pieces)


def exponential(estimate: Estimate) -> Estimate:
    """The estimate of exp(x) from that of x; infinite where a float cannot hold it."""
    value, low, high = (math.exp(x) if x < 709 else math.inf for x in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high)


def estimate_share_difference(num_only_first: int, num_only_second: int, num_items: int) -> Estimate:
    """Share of right items of the second runner less that of the first, on the same items, with an interval for paired shares.

    The interval is Bonett and Price's (2012, doi 10.3102/1076998611411915): Wald's with one item added to each kind of difference.
    Where no item differs it still has a width, which a bootstrap has not: ten items without a difference prove little.
    """
    first, second, n = (num_only_first + 1) / (num_items + 2), (num_only_second + 1) / (num_items + 2), num_items + 2
    center, half = second - first, Z * math.sqrt((first + second - (second - first) ** 2) / n)
    return Estimate((num_only_second - num_only_first) / num_items, max(-1.0, center - half), min(1.0, center + half))


def mcnemar_p_value(num_only_first: int, num_only_second: int) -> float:
    """Exact two-sided McNemar test: how likely so uneven a split of the items on which two runners differ is by chance.

    `num_only_first` items only the first runner has right, `num_only_second` only the second. Under the hypothesis of no difference
    each is a coin toss; the p-value is twice the smaller binomial tail, at most 1 (McNemar 1947; exact form as in Fagerland,
    Lydersen and Laake 2013, doi 10.1186/1471-2288-13-91).
    """
    tosses, fewer = num_only_first + num_only_second, min(num_only_first, num_only_second)
    term, tail = 1, 1
    for count in range(fewer):
        term = term * (tosses - count) // (count + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**tosses))
