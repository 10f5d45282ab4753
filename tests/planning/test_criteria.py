"""Criteria rank or choose layers the way they say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voidprune.errors import BudgetError
from voidprune.planning.criteria import CRITERIA, Criterion, Part, find_criterion, top_layers
from voidprune.profiling.profile import LayerStatistics, empty_statistics

# Spans 0-0, 0-1, 0-2, 0-3; 1-1, 1-2, 1-3; 2-2, 2-3; 3-3 of two samples.
SPANS = (0.8, 1.0, 1.2, 1.6, 0.6, 0.4, 0.9, 0.6, 0.7, 0.8)
STATISTICS = LayerStatistics(
    num_tokens=10,
    active=(10, 2, 7, 5),
    cosine_distance=(1.0, 4.0, 2.0, 3.0),
    relative_change=(9.0, 1.0, 5.0, 3.0),
    attention_distance=(0.5, 3.0, 1.0, 2.0),
    mlp_distance=(2.0, 0.5, 3.0, 1.0),
    num_spans=2,
    span_distance=SPANS,
)


@pytest.mark.parametrize(
    ("name", "best_to_worst"),
    [
        ("lac", [0, 2, 3, 1]),
        ("block-influence", [1, 3, 2, 0]),
        ("relative-norm", [0, 2, 3, 1]),
        ("attention-cosine", [1, 3, 2, 0]),
        ("mlp-cosine", [2, 0, 3, 1]),
        ("last-n", [3, 0, 1, 2]),
        ("first-n", [0, 3, 2, 1]),
    ],
)
def test_ranking(name: str, best_to_worst: list[int]) -> None:
    for count in range(1, 5):
        assert find_criterion(name).choose(STATISTICS, count) == tuple(sorted(best_to_worst[:count]))


def test_angular_drops_the_span_that_turns_least() -> None:
    """Of two spans of one layer that turn by 0.3, the later goes. Two layers: 1-2 (0.2). Three: 1-3 (0.45), not 0-2 (0.6)."""
    choose = find_criterion("angular").choose
    assert choose(STATISTICS, 4) == (0, 1, 2, 3)
    assert choose(STATISTICS, 3) == (0, 1, 3)
    assert choose(STATISTICS, 2) == (0, 3)
    assert choose(STATISTICS, 1) == (0,)


@pytest.mark.parametrize(
    ("num_layers", "num_kept", "kept"),
    [(12, 12, tuple(range(12))), (12, 4, (0, 4, 7, 11)), (13, 4, (0, 4, 8, 12)), (12, 2, (0, 11)), (12, 1, (11,))],
)
def test_evenly_spaced(num_layers: int, num_kept: int, kept: tuple[int, ...]) -> None:
    assert find_criterion("evenly-spaced").choose(empty_statistics(num_layers), num_kept) == kept


@given(st.sampled_from(sorted(CRITERIA)), st.integers(1, 40), st.data())
def test_every_criterion_keeps_as_many_layers_as_it_is_told(name: str, num_layers: int, data: st.DataObject) -> None:
    num_kept = data.draw(st.integers(1, num_layers))
    kept = CRITERIA[name].choose(empty_statistics(num_layers), num_kept, seed=3)
    assert list(kept) == sorted(set(kept))
    assert len(kept) == num_kept
    assert set(kept) <= set(range(num_layers))


def test_random_is_seeded() -> None:
    choose = find_criterion("random").choose
    statistics = empty_statistics(40)
    assert choose(statistics, 20, seed=1) == choose(statistics, 20, seed=1) != choose(statistics, 20, seed=2)


def test_what_is_left_out() -> None:
    parts = {name: criterion.part for name, criterion in CRITERIA.items() if criterion.part is not Part.LAYER}
    assert parts == {"attention-cosine": Part.ATTENTION, "mlp-cosine": Part.MLP}


def test_a_criterion_scores_or_selects() -> None:
    with pytest.raises(AssertionError, match="scores or selects"):
        Criterion("none", "", "")


def test_of_equal_scores_the_earlier_layer_is_kept() -> None:
    assert top_layers([1.0, 2.0, 1.0, 2.0], 3) == (0, 1, 3)


def test_unknown_criterion_names_the_known() -> None:
    with pytest.raises(BudgetError, match="no criterion 'magic'") as caught:
        find_criterion("magic")
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in CRITERIA)
