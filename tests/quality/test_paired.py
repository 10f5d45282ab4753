"""Two runners on the same items."""

from __future__ import annotations

import math

import numpy as np
import pytest

from voidprune.quality.evaluation import Evaluation
from voidprune.quality.paired import compare_loss, compare_runners
from voidprune.quality.statistics import estimate_share_difference, mcnemar_p_value

GROUPS = ("a",) * 6 + ("b",) * 4


def evaluation(right: str, nll: list[float]) -> Evaluation:
    marks = np.array([mark == "+" for mark in right], np.bool_)
    return Evaluation(nll=np.array(nll), num_tokens=np.array([2.0, 4.0]), right=marks, groups=GROUPS)


def test_differences_item_by_item() -> None:
    found = compare_runners(evaluation("++++++++--", [2.0, 4.0]), evaluation("+---+++-+-", [3.0, 5.0]))
    first, second = found.accuracy["a"], found.accuracy["b"]
    assert (first.num_only_baseline, first.num_only_this, first.num_items) == (3, 0, 6)
    assert first.difference == estimate_share_difference(3, 0, 6)
    assert (second.num_only_baseline, second.num_only_this) == (1, 1)
    assert second.difference.value == 0
    assert found.overall is not None
    assert found.overall.difference.value == pytest.approx(-0.3)
    assert found.overall.p_value == mcnemar_p_value(4, 1)
    ratio = found.perplexity_ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(math.exp(2 / 6))
    assert (ratio.low, ratio.high) == (pytest.approx(math.exp(1 / 4)), pytest.approx(math.exp(1 / 2)))


def test_pairing_sees_what_two_intervals_do_not() -> None:
    """Items differ widely in difficulty, the second runner is a little worse on each: apart that drowns, paired it does not."""
    random = np.random.default_rng(0)
    nll, ones = random.gamma(1.0, 2.0, 200), np.ones(200)
    one, other = Evaluation(nll=nll, num_tokens=ones), Evaluation(nll=nll * 1.02, num_tokens=ones)
    apart = one.perplexity_estimate, other.perplexity_estimate
    assert apart[0] is not None
    assert apart[1] is not None
    assert apart[0].high > apart[1].low
    ratio = compare_loss(one, other)
    assert ratio is not None
    assert ratio.low > 1.0


def test_nothing_scored_or_answered() -> None:
    found = compare_runners(Evaluation(), Evaluation())
    assert (found.perplexity_ratio, dict(found.accuracy), found.overall) == (None, {}, None)


def test_other_items_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="the items differ"):
        compare_runners(evaluation("++++++++++", [1.0, 1.0]), Evaluation())
