"""Samples follow the distribution that is left of the logits, and depend on the seed and the prompt alone."""

from __future__ import annotations

import numpy as np
import pytest

from voidprune.execution.sampling import Sampling, draw_scores, row_dice

LOGITS = np.log([[0.05, 0.5, 0.15, 0.3]])


def draws(sampling: Sampling, count: int = 4000) -> list[float]:
    dice = row_dice(0, "tokens", [1, 2])
    chosen = [int(draw_scores(LOGITS, sampling, [dice]).argmax()) for _ in range(count)]
    return [chosen.count(token) / count for token in range(4)]


def test_the_full_distribution_is_sampled() -> None:
    assert draws(Sampling(1.0)) == pytest.approx([0.05, 0.5, 0.15, 0.3], abs=0.03)


def test_temperature_sharpens() -> None:
    squared = np.array([0.05, 0.5, 0.15, 0.3]) ** 2
    assert draws(Sampling(0.5)) == pytest.approx((squared / squared.sum()).tolist(), abs=0.03)


def test_next_to_zero_a_temperature_leaves_the_likeliest_alone() -> None:
    for logits in (LOGITS, LOGITS + 500, LOGITS - 500):
        scores = draw_scores(logits, Sampling(1e-308, 0.9, top_k=3), [row_dice(0, "tokens", [1])])
        assert np.isfinite(scores).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {1}), (0.6, {1, 3}), (0.85, {1, 2, 3}), (0.96, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_the_token_that_crosses_the_border_stays(top_p: float, kept: set[int]) -> None:
    scores = draw_scores(LOGITS, Sampling(1.0, top_p), [row_dice(0, "tokens", [1])])
    assert {token for token in range(4) if np.isfinite(scores[0, token])} == kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (1, 1.0, {1}),
        (2, 1.0, {1, 3}),
        (4, 1.0, {0, 1, 2, 3}),
        (9, 1.0, {0, 1, 2, 3}),
        (2, 0.6, {1}),
        (3, 0.96, {1, 2, 3}),
    ],
)
def test_top_p_counts_what_top_k_left(top_k: int, top_p: float, kept: set[int]) -> None:
    """Of 0.5 and 0.3 the first is 0.625 of the probability, so that a top-p of 0.6 leaves it alone."""
    scores = draw_scores(LOGITS, Sampling(1.0, top_p, top_k=top_k), [row_dice(0, "tokens", [1])])
    assert {token for token in range(4) if np.isfinite(scores[0, token])} == kept


def test_dice_depend_on_seed_purpose_and_prompt() -> None:
    first = row_dice(3, "tokens", [5, 6]).random(4).tolist()
    assert row_dice(3, "tokens", [5, 6]).random(4).tolist() == first
    for other in (row_dice(4, "tokens", [5, 6]), row_dice(3, "layers", [5, 6]), row_dice(3, "tokens", [6, 5])):
        assert other.random(4).tolist() != first
    assert row_dice(-1, "tokens", [5]).random() != row_dice(1, "tokens", [5]).random()


@pytest.mark.parametrize(
    ("temperature", "top_p", "message"),
    [
        (0.0, 0.9, "temperature of 0"),
        (float("nan"), 0.9, "temperature of nan"),
        (float("inf"), 0.9, "temperature of inf"),
        (0.6, 0.0, "top-p of 0 is outside"),
        (0.6, 1.1, "top-p of 1.1 is outside"),
        (0.6, float("nan"), "top-p of nan is outside"),
    ],
)
def test_senseless_values_are_refused(temperature: float, top_p: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(temperature, top_p)


def test_a_top_k_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="top-k of 0 leaves no token"):
        Sampling(1.0, top_k=0)
