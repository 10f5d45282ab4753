"""Two runners on the same items: differences with intervals, and whether a difference could be chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from voidprune.quality.evaluation import Evaluation
from voidprune.quality.statistics import (
    Estimate,
    estimate_ratio,
    estimate_share_difference,
    exponential,
    mcnemar_p_value,
)


@dataclass(frozen=True)
class AccuracyDifference:
    """Accuracy of one runner less that of the baseline, on the same items.

    `difference` is in shares (-0.02: two items in a hundred fewer). `p_value` is McNemar's exact one, from the items that only one
    of the two has right.
    """

    difference: Estimate
    num_only_baseline: int
    num_only_this: int
    num_items: int

    @property
    def p_value(self) -> float:
        return mcnemar_p_value(self.num_only_baseline, self.num_only_this)

    def to_document(self) -> dict[str, Any]:
        return {
            "difference": self.difference.value,
            "interval": [self.difference.low, self.difference.high],
            "num_only_whole": self.num_only_baseline,
            "num_only_this": self.num_only_this,
            "num_items": self.num_items,
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class Comparison:
    """One runner beside the baseline. `perplexity_ratio` is this / baseline; `accuracy` is by task, `overall` over all items."""

    perplexity_ratio: Estimate | None
    accuracy: Mapping[str, AccuracyDifference]
    overall: AccuracyDifference | None

    def to_document(self) -> dict[str, Any]:
        ratio = self.perplexity_ratio
        return {
            "perplexity_ratio": None if ratio is None else ratio.to_document(),
            "accuracy": {task: difference.to_document() for task, difference in self.accuracy.items()},
            "overall": None if self.overall is None else self.overall.to_document(),
        }


def compare_runners(baseline: Evaluation, other: Evaluation) -> Comparison:
    """`other` beside `baseline`. Both are evaluations of the same items in the same order."""
    assert baseline.groups == other.groups, "the items differ"
    assert np.array_equal(baseline.num_tokens, other.num_tokens), "the responses differ"
    groups = np.array(baseline.groups)
    return Comparison(
        perplexity_ratio=compare_loss(baseline, other),
        accuracy={
            task: _compare_marks(baseline.right[groups == task], other.right[groups == task])
            for task in baseline.accuracy
        },
        overall=_compare_marks(baseline.right, other.right) if len(baseline.right) else None,
    )


def compare_loss(baseline: Evaluation, other: Evaluation) -> Estimate | None:
    """Perplexity of `other` / perplexity of `baseline`; None where nothing was scored.

    exp of the mean difference of log-likelihoods a token, so an item counts by its tokens; the interval is over items.
    """
    if not len(baseline.nll):
        return None
    return exponential(estimate_ratio(other.nll - baseline.nll, baseline.num_tokens))


def _compare_marks(
    baseline: np.ndarray[Any, np.dtype[np.bool_]], other: np.ndarray[Any, np.dtype[np.bool_]]
) -> AccuracyDifference:
    lost, won = int((baseline & ~other).sum()), int((other & ~baseline).sum())
    return AccuracyDifference(
        difference=estimate_share_difference(lost, won, len(baseline)),
        num_only_baseline=lost,
        num_only_this=won,
        num_items=len(baseline),
    )
