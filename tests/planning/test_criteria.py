"""Criteria rank layers the way they say."""

from __future__ import annotations

import pytest

from voidprune.errors import BudgetError
from voidprune.planning.criteria import CRITERIA, find_criterion
from voidprune.profiling.profile import LayerStatistics

STATISTICS = LayerStatistics(10, (10, 2, 7, 5), (1.0, 4.0, 2.0, 3.0), (9.0, 1.0, 5.0, 3.0))


@pytest.mark.parametrize(
    ("name", "best_to_worst"),
    [
        ("lac", [0, 2, 3, 1]),
        ("block-influence", [1, 3, 2, 0]),
        ("relative-norm", [0, 2, 3, 1]),
        ("last-n", [3, 0, 1, 2]),
    ],
)
def test_ranking(name: str, best_to_worst: list[int]) -> None:
    scores = find_criterion(name).score(STATISTICS, 0)
    assert sorted(range(4), key=lambda layer: -scores[layer]) == best_to_worst


def test_random_is_seeded() -> None:
    score = find_criterion("random").score
    assert score(STATISTICS, 1) == score(STATISTICS, 1) != score(STATISTICS, 2)


def test_unknown_criterion_names_the_known() -> None:
    with pytest.raises(BudgetError, match="no criterion 'magic'") as caught:
        find_criterion("magic")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in CRITERIA)
